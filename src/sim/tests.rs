//! The simulator itself: what a crash keeps, that faults are seen, that runs repeat, and that a
//! writer which forgets a sync is found.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::*;
use crate::io::durable::{self, DurableError};
use crate::io::{ALIGNMENT, File, Io, IoCause};

/// Seeds within which a planted bug has to be found.
const CANARY_SEEDS: u64 = 50;

/// The version with which a small file begins; 0 where there is none.
fn version_found(world: &mut SimWorld, path: PathBuf) -> Result<u64, String> {
    let read = world.run(|io| async move { durable::read_file(&io, &path).await });
    match read.map_err(|error| error.to_string())? {
        Ok(body) => Ok(u64::from_le_bytes(*body.first_chunk().unwrap())),
        Err(DurableError::Io(error)) if error.cause == IoCause::NotFound => Ok(0),
        Err(error) => Err(error.to_string()),
    }
}

/// A writer that replaces one small file again and again and says which versions it was told
/// are durable; a crash at a random step; then a reader. The hash of the run, or what was lost.
fn replace_and_crash(seed: u64, planted: SimOptions) -> Result<u64, String> {
    let options = SimOptions { ignore_file_sync: planted.ignore_file_sync, ..planted };
    let mut world = SimWorld::new(seed, options);
    let dir = Path::new("/data");
    let path = dir.join("index");
    world
        .run(|io| async move {
            io.create_dir(dir).await.unwrap();
            io.sync_dir(&io.dir_change(Path::new("/"))).await.unwrap();
        })
        .map_err(|error| error.to_string())?;
    let acknowledged = Rc::new(RefCell::new(0u64));
    for _ in 0..3 {
        let (told, target) = (Rc::clone(&acknowledged), path.clone());
        let steps = 1 + world.draw("crash step", 200);
        let first = *told.borrow() + 1;
        let _ = world
            .run_steps(steps, |io| async move {
                for version in first.. {
                    let body = version.to_le_bytes().repeat(700);
                    durable::write_file_atomic(&io, &target, &body).await.unwrap();
                    *told.borrow_mut() = version;
                }
            })
            .map_err(|error| error.to_string())?;
        world.crash();
        let told = *acknowledged.borrow();
        let found = version_found(&mut world, path.clone())?;
        if found != told && found != told + 1 {
            return Err(format!("version {told} was acknowledged, {found} found"));
        }
        *acknowledged.borrow_mut() = found;
    }
    Ok(world.trace_hash())
}

#[test]
fn canary_correct_writer_passes_a_thousand_seeds() {
    let scenario = |seed| replace_and_crash(seed, SimOptions::varied(seed));
    check_seeds("sim::tests::canary", 0..1000, scenario).unwrap();
}

#[test]
fn canary_skipped_file_sync_is_found() {
    let found = (0..CANARY_SEEDS).find(|seed| {
        let options = SimOptions { ignore_file_sync: true, ..SimOptions::varied(*seed) };
        replace_and_crash(*seed, options).is_err()
    });
    assert!(found.is_some(), "not found in {CANARY_SEEDS} seeds");
}

#[test]
fn canary_skipped_dir_sync_is_found() {
    let found = (0..CANARY_SEEDS).find(|seed| {
        let options = SimOptions { ignore_dir_sync: true, ..SimOptions::varied(*seed) };
        replace_and_crash(*seed, options).is_err()
    });
    assert!(found.is_some(), "not found in {CANARY_SEEDS} seeds");
}

/// Two tasks write a file each into one directory, over and over, on a disk where syncs fail; then
/// the power goes. What was acknowledged must be there.
fn two_writers_and_a_crash(seed: u64, planted: bool) -> Result<u64, String> {
    let options = SimOptions {
        sync_error_per_million: 200_000,
        ignore_other_dir_syncs: planted,
        ..SimOptions::varied(seed)
    };
    let mut world = SimWorld::new(seed, options);
    let dir = Path::new("/data");
    let made = world.run(|io| async move {
        io.set_faults(false);
        let change = io.dir_change(Path::new("/"));
        io.create_dir(dir).await.unwrap();
        io.sync_dir(&change).await.unwrap();
    });
    made.map_err(|error| error.to_string())?;
    let told: [Rc<Cell<u64>>; 2] = Default::default();
    let writers = told.clone();
    let steps = 1 + world.draw("crash step", 400);
    let run = world.run_steps(steps, |io| async move {
        io.set_faults(true);
        let write = |name: &'static str, told: Rc<Cell<u64>>| {
            let io = io.clone();
            async move {
                for version in 1u64.. {
                    let body = version.to_le_bytes();
                    if durable::write_file_atomic(&io, &dir.join(name), &body).await.is_ok() {
                        told.set(version);
                    }
                }
            }
        };
        let [one, other] = writers;
        futures_util::join!(write("one", one), write("other", other));
    });
    run.map_err(|error| error.to_string())?;
    world.crash();
    world.run(|io| async move { io.set_faults(false) }).map_err(|error| error.to_string())?;
    for (name, told) in ["one", "other"].into_iter().zip(told) {
        let found = version_found(&mut world, dir.join(name))?;
        if found < told.get() {
            return Err(format!("{name}: version {} was acknowledged, {found} found", told.get()));
        }
    }
    Ok(world.trace_hash())
}

#[test]
fn a_failed_sync_of_a_directory_is_everybodys_who_changed_it() {
    check_seeds("sim::tests::dir syncs", 0..1000, |seed| two_writers_and_a_crash(seed, false))
        .unwrap();
    let found = (0..1000).find(|seed| two_writers_and_a_crash(*seed, true).is_err());
    println!("found at seed {:?}", found.expect("the planted bug is not found"));
}

/// Tasks that write, sleep, draw and talk; the hash of it all.
fn busy_run(seed: u64) -> Result<u64, String> {
    let mut world = SimWorld::new(seed, SimOptions::swarm(seed));
    let run = world.run(|io| async move {
        let (sender, receiver) = async_channel::bounded(2);
        for task in 0..4u64 {
            let (io, sender) = (io.clone(), sender.clone());
            io.clone().spawn(TaskClass::Background, async move {
                for round in 0..5u64 {
                    io.sleep(Duration::from_micros(io.random_u64() % 500)).await;
                    let path = format!("/file-{task}-{round}");
                    let written = durable::write_file_atomic(&io, Path::new(&path), &[1]).await;
                    io.yield_if_needed().await;
                    sender.send((task, written.is_ok())).await.unwrap();
                }
            });
        }
        drop(sender);
        while receiver.recv().await.is_ok() {}
    });
    run.map_err(|error| error.to_string())?;
    Ok(world.trace_hash())
}

#[test]
fn a_seed_repeats_and_seeds_differ() {
    check_seeds("sim::tests", 0..100, busy_run).unwrap();
    let hashes: std::collections::BTreeSet<u64> =
        (0..100).map(|seed| busy_run(seed).unwrap()).collect();
    assert_eq!(hashes.len(), 100);
}

#[test]
fn a_run_that_differs_is_reported() {
    let calls = std::cell::Cell::new(0);
    let scenario = |_| {
        calls.set(calls.get() + 1);
        Ok(calls.get())
    };
    let text = check_seeds("x", 3..4, scenario).unwrap_err();
    assert!(text.contains("not deterministic") && text.contains("PGSTRATA_SEED=3"), "{text}");
}

#[test]
fn a_deadlock_names_its_tasks() {
    let mut world = SimWorld::new(1, SimOptions::default());
    let run = world.run(|io| async move {
        io.sleep(Duration::from_secs(3600)).await;
        let (_sender, receiver) = async_channel::bounded::<()>(1);
        receiver.recv().await.unwrap();
    });
    let Err(SimError::Deadlock { tasks, .. }) = run else { panic!("{run:?}") };
    assert!(tasks[0].contains("Serve") && tasks[0].contains("sleep"), "{tasks:?}");
}

#[test]
fn a_task_that_spins_is_stopped() {
    let options = SimOptions { steps_max: 1000, ..SimOptions::default() };
    let run = SimWorld::new(1, options).run(|_| async move {
        loop {
            futures_lite::future::yield_now().await;
        }
    });
    assert!(matches!(run, Err::<(), _>(SimError::NoEnd { .. })));
}

#[test]
fn an_open_file_that_is_dropped_is_reported() {
    let run = SimWorld::new(1, SimOptions::default()).run(|io| async move {
        drop(io.create(Path::new("/x")).await);
    });
    let Err(SimError::Violations(found)) = run else { panic!("{run:?}") };
    assert!(found[0].contains("/x: dropped without close"), "{found:?}");
}

#[test]
fn a_kill_keeps_what_a_power_loss_may_take() {
    let (mut lost, mut kept, mut torn) = (0, 0, 0);
    for seed in 0..200 {
        let mut world = SimWorld::new(seed, SimOptions::default());
        let path = Path::new("/x");
        world
            .run(|io| async move {
                let file = io.create(path).await.unwrap();
                file.allocate(ALIGNMENT as u64).await.unwrap();
                file.sync().await.unwrap();
                io.sync_dir(&io.dir_change(Path::new("/"))).await.unwrap();
                let mut buf = file.alloc(ALIGNMENT);
                buf.fill(9);
                file.write_at(0, buf).await.unwrap();
                file.close().await.unwrap();
            })
            .unwrap();
        let sectors = |world: &mut SimWorld| {
            let run = world.run(|io| async move {
                let file = io.open(path).await.unwrap();
                let bytes = file.read_at(0, ALIGNMENT).await.unwrap();
                file.close().await.unwrap();
                bytes.chunks(512).filter(|sector| sector.iter().all(|byte| *byte == 9)).count()
            });
            run.unwrap()
        };
        assert_eq!(sectors(&mut world), 8, "the machine lives");
        world.crash();
        match sectors(&mut world) {
            0 => lost += 1,
            8 => kept += 1,
            _ => torn += 1,
        }
    }
    assert!(lost > 20 && kept > 20 && torn > 20, "lost {lost}, kept {kept}, torn {torn}");
}

#[test]
fn a_rename_between_directories_is_whole_or_absent() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..100 {
        let mut world = SimWorld::new(seed, SimOptions::default());
        let run = world.run(|io| async move {
            for dir in ["/a", "/b"] {
                io.create_dir(Path::new(dir)).await.unwrap();
            }
            io.create(Path::new("/a/x")).await.unwrap().close().await.unwrap();
            io.sync_dir(&io.dir_change(Path::new("/a"))).await.unwrap();
            io.sync_dir(&io.dir_change(Path::new("/"))).await.unwrap();
            io.rename(Path::new("/a/x"), Path::new("/b/x")).await.unwrap();
            if seed % 2 == 0 {
                io.sync_dir(&io.dir_change(Path::new("/b"))).await.unwrap();
            }
        });
        run.unwrap();
        world.crash();
        let run = world.run(|io| async move {
            let source = io.list(Path::new("/a")).await.unwrap().len();
            (source, io.list(Path::new("/b")).await.unwrap().len())
        });
        let left = run.unwrap();
        assert!(left == (0, 1) || left == (1, 0) && seed % 2 == 1, "seed {seed}: {left:?}");
        seen.insert(left);
    }
    assert_eq!(seen.len(), 2);
}

async fn one_write(io: &SimIo, sync: bool) -> Result<Vec<u8>, crate::io::IoError> {
    let file = io.create(Path::new("/x")).await?;
    let result = async {
        let mut buf = file.alloc(8 * ALIGNMENT);
        buf.fill(3);
        file.write_at(0, buf).await?;
        if sync {
            file.sync().await?;
        }
        Ok(file.read_at(0, 8 * ALIGNMENT).await?.to_vec())
    };
    let result = result.await;
    file.close().await?;
    result
}

#[test]
fn each_fault_strikes() {
    const ALWAYS: u32 = 1_000_000;
    let run = |options: SimOptions| {
        SimWorld::new(5, options).run(|io| async move { one_write(&io, true).await }).unwrap()
    };
    let default = SimOptions::default;
    assert_eq!(run(default()).unwrap(), [3; 8 * ALIGNMENT]);
    let fails = |options, operation| assert_eq!(run(options).unwrap_err().operation, operation);
    fails(SimOptions { read_error_per_million: ALWAYS, ..default() }, "read");
    fails(SimOptions { write_error_per_million: ALWAYS, ..default() }, "write");
    fails(SimOptions { sync_error_per_million: ALWAYS, ..default() }, "sync");
    fails(SimOptions { metadata_error_per_million: ALWAYS, ..default() }, "create");
    let full = run(SimOptions { capacity_bytes: Some(4 * ALIGNMENT as u64), ..default() });
    assert_eq!(full.unwrap_err().cause, IoCause::NoSpace);
    let flipped = run(SimOptions { bit_flip_per_million: ALWAYS, ..default() }).unwrap();
    assert_eq!(flipped.iter().map(|byte| (byte ^ 3).count_ones()).sum::<u32>(), 1);
    let lost = run(SimOptions { misdirected_write_per_million: ALWAYS, ..default() }).unwrap();
    assert!(lost.is_empty(), "the write went elsewhere and there was no elsewhere");
}

#[test]
fn space_comes_back_when_a_file_is_gone() {
    let options =
        SimOptions { capacity_bytes: Some(8 * ALIGNMENT as u64), ..SimOptions::default() };
    let run = SimWorld::new(2, options).run(|io| async move {
        for _ in 0..5 {
            one_write(&io, false).await.unwrap();
            io.remove(Path::new("/x")).await.unwrap();
            io.sync_dir(&io.dir_change(Path::new("/"))).await.unwrap();
        }
    });
    assert_eq!(run, Ok(()));
}

#[test]
fn a_second_sync_after_a_failed_one_is_reported() {
    let options = SimOptions { sync_error_per_million: 1_000_000, ..SimOptions::default() };
    let run = SimWorld::new(2, options).run(|io| async move {
        let file = io.create(Path::new("/x")).await.unwrap();
        assert!(file.sync().await.is_err());
        io.set_faults(false);
        assert!(file.sync().await.is_err(), "what is lost stays lost");
        file.close().await.unwrap();
    });
    assert!(matches!(run, Err(SimError::Violations(_))), "{run:?}");
}

#[test]
fn another_draw_in_one_stream_shifts_no_other() {
    let run = |draws: u64| {
        let mut world = SimWorld::new(11, SimOptions::default());
        for _ in 0..draws {
            world.draw("a", 100);
        }
        world.run(|io| async move { one_write(&io, true).await.unwrap() }).unwrap();
        (world.draw("b", u64::MAX), world.trace_hash())
    };
    assert_eq!(run(0), run(7));
}

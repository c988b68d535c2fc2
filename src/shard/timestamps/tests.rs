use super::*;

const SECOND: i64 = 1_000_000;

/// Commits with the times they claim, and clocks that sometimes jump.
fn commits(rng: &mut fastrand::Rng, count: usize) -> Vec<(Lsn, Timestamp)> {
    let (mut lsn, mut time) = (rng.u64(1..1 << 40), rng.i64(-5 * SECOND..1 << 50));
    let pace = [1_000, 200_000, SECOND, 90 * SECOND][rng.usize(..4)];
    let mut all = Vec::new();
    for _ in 0..count {
        lsn += rng.u64(1..10_000);
        time += rng.i64(0..2 * pace);
        match rng.u8(..200) {
            0 => time -= rng.i64(0..100 * pace),
            1 => time += rng.i64(0..1000 * pace),
            _ => {}
        }
        all.push((Lsn(lsn), Timestamp(time)));
    }
    all
}

/// Brute force: the last commit with nothing later than `time` at or before it.
fn exact(commits: &[(Lsn, Timestamp)], time: Timestamp) -> Option<Lsn> {
    commits.iter().take_while(|(_, at)| *at <= time).last().map(|(lsn, _)| *lsn)
}

fn lsn_of(answer: AtTime) -> Option<Lsn> {
    match answer {
        AtTime::Present(lsn) | AtTime::Future(lsn) => Some(lsn),
        AtTime::Past | AtTime::NoData => None,
    }
}

#[test]
fn answers_never_include_a_later_commit_and_are_short_by_a_second_at_most() {
    for seed in 0..300 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let commits = commits(&mut rng, 400);
        let mut times = CommitTimes::default();
        assert_eq!(times.at_time(Timestamp(0)), AtTime::NoData);
        for (number, (lsn, time)) in commits.iter().enumerate() {
            times.note(*lsn, *time);
            if rng.u8(..100) == 0 {
                times.close_bucket();
            }
            let known = &commits[..=number];
            let (_, near) = known[rng.usize(..known.len())];
            let time = Timestamp(near.0 + rng.i64(-3 * SECOND..3 * SECOND));
            let (answer, best) = (times.at_time(time), exact(known, time));
            assert!(lsn_of(answer) <= best, "seed {seed}: {answer:?} at {time} > {best:?}");
            let earlier = exact(known, Timestamp(time.0 - SECOND));
            assert!(lsn_of(answer) >= earlier, "seed {seed}: {answer:?} at {time} < {earlier:?}");
            let later = known.iter().any(|(_, at)| *at > time);
            match answer {
                AtTime::Future(_) => assert!(!later, "seed {seed}"),
                AtTime::Present(_) | AtTime::Past => assert!(later, "seed {seed}"),
                AtTime::NoData => panic!("seed {seed}: there are data"),
            }
        }
    }
}

#[test]
fn times_of_lsns_are_consistent_with_lsns_of_times() {
    for seed in 0..200 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let commits = commits(&mut rng, 300);
        let mut times = CommitTimes::default();
        commits.iter().for_each(|(lsn, time)| times.note(*lsn, *time));
        for (lsn, _) in &commits {
            let lsn = Lsn(lsn.0 + rng.u64(..50));
            let Some((_, time)) = times.of_lsn(lsn) else { continue };
            let back = lsn_of(times.at_time(time)).unwrap();
            let max = commits.iter().take_while(|(at, _)| *at <= lsn).map(|(_, t)| *t).max();
            assert!(time <= max.unwrap(), "seed {seed}: {time} at {lsn} is too late");
            assert!(
                back <= lsn || times.of_lsn(back).is_some_and(|(_, at)| at == time),
                "seed {seed}"
            );
        }
        assert_eq!(times.of_lsn(Lsn(commits[0].0.0 - 1)), None);
    }
}

#[test]
fn memory_is_bounded_and_thinning_keeps_the_promise() {
    let day = 86_400;
    let mut times = CommitTimes::default();
    // One commit each second for eight days, and each second a jump back now and then.
    let start = 800_000_000 * SECOND;
    for second in 0..8 * day {
        times.note(Lsn(1000 + second as u64 * 100), Timestamp(start + second * SECOND));
        assert!(times.len() < COMMIT_TIMES_MAX);
    }
    let newest = start + (8 * day - 1) * SECOND;
    for age in [0, 10, 3_600, 10 * 3_600, day, 3 * day, 7 * day] {
        let time = newest - age * SECOND;
        let answer = lsn_of(times.at_time(Timestamp(time))).unwrap();
        let best = Lsn(1000 + (8 * day - 1 - age) as u64 * 100);
        assert!(answer <= best);
        let short_s = best.bytes_since(answer) as i64 / 100;
        let allowed = (2 * age / COMMIT_TIMES_SHARE_OF_AGE).max(1);
        assert!(short_s <= allowed, "{short_s} s short at an age of {age} s");
    }
}

#[test]
fn a_thinned_map_is_never_too_late() {
    for seed in 0..100 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let commits = commits(&mut rng, 500);
        let mut times = CommitTimes::default();
        commits.iter().for_each(|(lsn, time)| times.note(*lsn, *time));
        let before = times.clone();
        times.merge([0, 1, 10, 1000][rng.usize(..4)]);
        assert_eq!(times.samples.first(), before.samples.first());
        assert_eq!(times.samples.last(), before.samples.last());
        assert!(times.samples.is_sorted_by(|a, b| a.lsn < b.lsn && a.max <= b.max));
        for (_, time) in &commits {
            assert!(lsn_of(times.at_time(*time)) <= exact(&commits, *time), "seed {seed}");
        }
    }
}

#[test]
fn a_checkpoint_and_a_replay_give_back_what_was_there() {
    for seed in 0..200 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let commits = commits(&mut rng, 200);
        let (mut whole, mut checkpoints) = (CommitTimes::default(), Vec::new());
        for (lsn, time) in &commits {
            whole.note(*lsn, *time);
            if rng.u8(..20) == 0 {
                whole.close_bucket();
                checkpoints.push(*lsn);
            }
        }
        let Some(newest) = checkpoints.len().checked_sub(1) else { continue };
        // The file may be one checkpoint ahead of the index, and it is written when newer commits
        // are in memory already.
        let in_file = rng.usize(..=newest);
        let in_index = in_file.saturating_sub(rng.usize(..2));
        let (in_file, in_index) = (checkpoints[in_file], checkpoints[in_index]);
        let mut restarted = CommitTimes::decode(&whole.encode(in_file)).unwrap();
        assert_eq!(restarted.mark(in_file), whole.mark(in_file));
        restarted.truncate(in_index);
        assert_eq!(restarted.mark(in_index), whole.mark(in_index));
        for (lsn, time) in commits.iter().filter(|(lsn, _)| *lsn > in_index) {
            restarted.note(*lsn, *time);
        }
        for (_, time) in &commits {
            assert!(lsn_of(restarted.at_time(*time)) <= exact(&commits, *time), "seed {seed}");
            let earlier = exact(&commits, Timestamp(time.0 - SECOND));
            assert!(lsn_of(restarted.at_time(*time)) >= earlier, "seed {seed}");
        }
    }
}

#[test]
fn trimming_keeps_what_is_asked_for_at_the_cutoff_and_later() {
    let mut times = CommitTimes::default();
    for n in 1..=10 {
        times.note(Lsn(n * 100), Timestamp(n as i64 * 10 * SECOND));
    }
    times.trim(Lsn(450));
    assert_eq!(times.len(), 7);
    assert_eq!(times.at_time(Timestamp(39 * SECOND)), AtTime::Past);
    assert_eq!(times.at_time(Timestamp(41 * SECOND)), AtTime::Present(Lsn(400)));
    assert_eq!(times.of_lsn(Lsn(450)).map(|(_, at)| at), Some(Timestamp(40 * SECOND)));
    times.trim(Lsn(0));
    assert_eq!(times.len(), 7);
    times.trim(Lsn(5000));
    assert_eq!(times.at_time(Timestamp(100 * SECOND)), AtTime::Future(Lsn(1000)));
    assert_eq!(times.len(), 1);
}

#[test]
fn absurd_times_do_no_harm() {
    let mut times = CommitTimes::default();
    for (lsn, time) in [(1, i64::MIN), (2, i64::MAX), (3, 0), (4, i64::MAX), (4, 1), (2, 7)] {
        times.note(Lsn(lsn), Timestamp(time));
    }
    assert_eq!(times.at_time(Timestamp(0)), AtTime::Present(Lsn(1)));
    assert_eq!(times.at_time(Timestamp(i64::MAX)), AtTime::Future(Lsn(4)));
    times.merge(0);
    times.merge(i64::MAX);
    assert_eq!(CommitTimes::decode(&times.encode(Lsn::MAX)).unwrap().samples, times.samples);
}

#[test]
fn golden_bytes_and_damage() {
    let mut times = CommitTimes::default();
    times.note(Lsn(0x0102), Timestamp(-1));
    times.note(Lsn(0x1_0000_0000), Timestamp(2 * SECOND));
    let bytes = times.encode(Lsn::MAX);
    let golden = "01000000020000000201000000000000ffffffffffffffff000000000100000080841e0000000000";
    assert_eq!(hex::encode(&bytes), golden);
    assert_eq!(times.encode(Lsn(0x0102)).len(), HEADER_BYTES + SAMPLE_BYTES);
    for len in 0..bytes.len() {
        assert!(CommitTimes::decode(&bytes[..len]).is_err(), "cut to {len}");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            // The container's checksum is what detects a change; here nothing may break.
            let _ = CommitTimes::decode(&changed);
        }
    }
    assert!(CommitTimes::decode(&[&bytes[..], &[0]].concat()).is_err());
}

#[test]
fn a_branch_begins_with_what_is_known_of_its_branch_point() {
    let mut times = CommitTimes::default();
    assert_eq!(times.of_branch(Lsn(5)), None);
    for (lsn, second) in [(100, 10), (200, 5_000)] {
        times.note(Lsn(lsn), Timestamp(second * SECOND));
    }
    let begin = |lsn| times.of_branch(Lsn(lsn)).unwrap().of_lsn(Lsn(lsn));
    assert_eq!(begin(100), Some((Lsn(100), Timestamp(10 * SECOND))));
    // Between the two samples it is not known where the second bucket begins.
    assert_eq!(begin(150), Some((Lsn(150), Timestamp(5_000 * SECOND))));
    assert_eq!(begin(300), Some((Lsn(300), Timestamp(5_000 * SECOND))));
    let mut branch = times.of_branch(Lsn(300)).unwrap();
    assert_eq!(branch, CommitTimes::decode(&branch.encode(Lsn(300))).unwrap());
    branch.note(Lsn(310), Timestamp(4_000 * SECOND));
    assert_eq!(branch.at_time(Timestamp(4_500 * SECOND)), AtTime::Past);
    assert_eq!(branch.at_time(Timestamp(5_000 * SECOND)), AtTime::Future(Lsn(310)));
}

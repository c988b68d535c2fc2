//! What the two executors of a core are to the kernel's scheduler.
//!
//! They share a CPU. The one that serves must run as soon as it has something to do; the one in the
//! background has what is left, but is not starved.

use std::sync::Once;

use crate::limits::SERVE_SLICE_US;

/// Gives the calling thread a lower priority.
#[allow(unsafe_code, reason = "setpriority has no safe wrapper")]
pub fn lower() {
    // SAFETY: the call takes three numbers and touches no memory; `0` names the calling thread.
    let result = unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, 10) };
    if result != 0 {
        tracing::warn!("the background executor keeps normal priority");
    }
}

static REFUSED: Once = Once::new();

/// Asks for short turns, which makes the calling thread run at once when it wakes up: Linux lets
/// who runs end a turn of some milliseconds before another has its own, unless that one's are
/// shorter (`sched_setattr(2)`; from Linux 6.12, older ones have turns of one length).
#[allow(unsafe_code, reason = "sched_setattr has no safe wrapper")]
pub fn shorten_turns() {
    let mut attributes = nix::libc::sched_attr {
        size: size_of::<nix::libc::sched_attr>() as u32,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // All else stays as the operator has it.
    // SAFETY: `0` names the calling thread; the kernel writes the structure, no more than the size
    // that it is told, and keeps no pointer to it.
    let mut result = unsafe {
        let size = attributes.size;
        nix::libc::syscall(nix::libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0)
    };
    if result == 0 {
        if attributes.sched_policy != nix::libc::SCHED_OTHER as u32 {
            return;
        }
        attributes.sched_runtime = SERVE_SLICE_US * 1000;
        // SAFETY: as above, but that the kernel reads the structure.
        result = unsafe {
            nix::libc::syscall(nix::libc::SYS_sched_setattr, 0, &raw const attributes, 0)
        };
    }
    if result != 0 {
        let error = std::io::Error::last_os_error();
        // The same for all cores.
        REFUSED.call_once(|| {
            tracing::warn!("turns of the serving executors keep their length: {error}");
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_turns_leave_the_rest_as_it_was() {
        let nice = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            fields[16].to_owned()
        };
        let run = std::thread::spawn(move || {
            let before = nice();
            shorten_turns();
            assert_eq!(nice(), before);
            lower();
            shorten_turns();
            assert_eq!(nice(), "10");
        });
        run.join().unwrap();
    }
}

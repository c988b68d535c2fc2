//! What the two executors of a core are to the kernel's scheduler.
//!
//! They share a CPU. The one that serves must run as soon as it has something to do; the one in the
//! background has what is left, but is not starved.

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

/// Asks for short turns, which makes the calling thread run at once when it wakes up: Linux lets
/// who runs end a turn of some milliseconds before another has its own, unless that one's are
/// shorter (`sched_setattr(2)`; from Linux 6.12, older ones have turns of one length).
#[allow(unsafe_code, reason = "sched_setattr has no safe wrapper")]
pub fn shorten_turns() {
    let attributes = nix::libc::sched_attr {
        size: size_of::<nix::libc::sched_attr>() as u32,
        sched_policy: nix::libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: SERVE_SLICE_US * 1000,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: `0` names the calling thread; the kernel reads the structure, whose size it is told,
    // and keeps no pointer to it.
    let result =
        unsafe { nix::libc::syscall(nix::libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!("turns of the serving executor keep their length: {error}");
    }
}

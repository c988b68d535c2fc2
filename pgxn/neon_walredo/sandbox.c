/*
 * Before the first record arrives the process gives up whatever redo does not need, because a
 * damaged or hostile record can take it over: redo trusts the WAL.
 */
#include "neon_walredo.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <malloc.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define SANDBOX_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define SANDBOX_ARCH AUDIT_ARCH_AARCH64
#else
#error "the system call filter is not written for this machine"
#endif

/* Address space of the process; the shared libraries take some 300 MB of it. */
#define SANDBOX_ADDRESS_SPACE ((rlim_t) 2 << 30)

static void
fail(const char *what)
{
	fprintf(stderr, "wal-redo: %s: %s\n", what, strerror(errno));
	_exit(1);
}

/*
 * Becomes the user that was asked for, if one was, and refuses to go on as root. The process is
 * killed by the kernel when the thread that started it ends; its closed stdin would end it too,
 * but only between two requests.
 */
void
sandbox_drop_privileges(const WalRedoOptions *options)
{
	if (options->drop_uid)
	{
		if (setgroups(0, NULL) != 0)
			fail("setgroups");
		if (setresgid(options->gid, options->gid, options->gid) != 0)
			fail("setresgid");
		if (setresuid(options->uid, options->uid, options->uid) != 0)
			fail("setresuid");
	}
	if (getuid() == 0 || geteuid() == 0)
	{
		fprintf(stderr, "wal-redo: does not run as root; give --uid and --gid\n");
		_exit(1);
	}
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
		fail("prctl(PR_SET_PDEATHSIG)");
	if (prctl(PR_SET_DUMPABLE, 0) != 0)
		fail("prctl(PR_SET_DUMPABLE)");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		fail("prctl(PR_SET_NO_NEW_PRIVS)");
}

static void
limit(int resource, rlim_t most)
{
	struct rlimit now;

	if (getrlimit(resource, &now) != 0)
		fail("getrlimit");
	if (now.rlim_max == RLIM_INFINITY || now.rlim_max > most)
		now.rlim_max = most;
	if (now.rlim_cur == RLIM_INFINITY || now.rlim_cur > now.rlim_max)
		now.rlim_cur = now.rlim_max;
	if (setrlimit(resource, &now) != 0)
		fail("setrlimit");
}

/*
 * Bounds on memory; no core files, which would hold the tenant's pages. malloc is told to live
 * on brk alone, now, so that no piece from mmap is left to be freed when that is forbidden.
 */
void
sandbox_set_limits(void)
{
	if (mallopt(M_MMAP_MAX, 0) != 1)
		fail("mallopt");
	limit(RLIMIT_CORE, 0);
	limit(RLIMIT_AS, SANDBOX_ADDRESS_SPACE);
}

/*
 * Leaves stdin, stdout and stderr, and of the system calls read, write, brk and exit_group. Any
 * other call kills the process.
 */
void
sandbox_close(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SANDBOX_ARCH, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_read, 4, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_write, 3, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_brk, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_exit_group, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {lengthof(filter), filter};

	if (syscall(__NR_close_range, 3, ~0U, 0) != 0)
	{
		/* Linux before 5.9 */
		for (int fd = 3; fd < 1024; fd++)
			close(fd);
	}
	limit(RLIMIT_NOFILE, 3);
	limit(RLIMIT_FSIZE, 0);
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
		fail("prctl(PR_SET_SECCOMP)");
}

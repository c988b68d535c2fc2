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

/* CPU time of its whole life, in seconds. The caller replaces a process well before. */
#define SANDBOX_CPU_SECONDS ((rlim_t) 3600)

/*
 * Landlock (linux/landlock.h, which older systems lack). The numbers of its system calls are the
 * same on all machines.
 */
#define LANDLOCK_CREATE_RULESET 444
#define LANDLOCK_RESTRICT_SELF 446
#define LANDLOCK_VERSION_FLAG 1

static const char *state = "none";

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
 * Forbids every access by path, to the network and to other processes that this kernel can
 * forbid. The filter below forbids them too; this holds should it have a hole. A kernel without
 * Landlock does without. True if it is in force.
 */
static bool
forbid_paths(void)
{
	struct
	{
		uint64		fs;
		uint64		net;
		uint64		scope;
	}			ruleset = {0};
	long		version;
	long		fd;

	version = syscall(LANDLOCK_CREATE_RULESET, NULL, 0, LANDLOCK_VERSION_FLAG);
	if (version < 1)
	{
		if (version == 0 || errno == ENOSYS || errno == EOPNOTSUPP)
			return false;
		fail("landlock_create_ruleset");
	}
	ruleset.fs = 0x1fff;		/* execute, read, write, remove, make */
	if (version >= 2)
		ruleset.fs |= 1 << 13;	/* link to and from other directories */
	if (version >= 3)
		ruleset.fs |= 1 << 14;	/* truncate */
	if (version >= 4)
		ruleset.net = 3;		/* bind, connect */
	if (version >= 5)
		ruleset.fs |= 1 << 15;	/* ioctl of devices */
	if (version >= 6)
		ruleset.scope = 3;		/* abstract sockets, signals */
	fd = syscall(LANDLOCK_CREATE_RULESET, &ruleset, sizeof(ruleset), 0);
	if (fd < 0)
		fail("landlock_create_ruleset");
	if (syscall(LANDLOCK_RESTRICT_SELF, fd, 0) != 0)
		fail("landlock_restrict_self");
	if (close((int) fd) != 0)
		fail("close");
	return true;
}

/*
 * Leaves stdin, stdout and stderr, and of the system calls read, write, brk and exit_group. Any
 * other call kills the process. Where the filter cannot be installed the process ends, unless
 * the caller said that it may go on.
 */
void
sandbox_close(const WalRedoOptions *options)
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
	bool		no_paths;

	if (clearenv() != 0)
		fail("clearenv");
	/* Linux 5.9; the node needs a newer one. */
	if (syscall(__NR_close_range, 3, ~0U, 0) != 0)
		fail("close_range");
	no_paths = forbid_paths();
	limit(RLIMIT_NOFILE, 3);
	limit(RLIMIT_FSIZE, 0);
	limit(RLIMIT_CPU, SANDBOX_CPU_SECONDS);
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0)
		state = no_paths ? "seccomp+landlock" : "seccomp";
	else if (options->sandbox_optional)
		fprintf(stderr, "wal-redo: RUNS WITHOUT A SANDBOX (prctl(PR_SET_SECCOMP): %s): "
				"whoever writes its WAL can take it over\n", strerror(errno));
	else
		fail("no sandbox, so it does not run: prctl(PR_SET_SECCOMP)");
}

/* What holds the process: seccomp+landlock, seccomp or none. */
const char *
sandbox_state(void)
{
	return state;
}

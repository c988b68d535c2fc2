/*
 * The way in. The library is loaded into a stock postgres by LD_PRELOAD and stands before glibc
 * in the search for __libc_start_main. If the first argument is --wal-redo, it passes its own
 * main to glibc; otherwise the binary starts as ever.
 *
 * Usage: postgres --wal-redo --hint-bits=on|off [--uid=N --gid=N] [--sandbox=optional]
 *
 * The working directory must be an empty directory. Two subdirectories are made there, and
 * removed before the first request.
 */
#include "neon_walredo.h"

#include <dirent.h>
#include <dlfcn.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/rmgr.h"
#include "access/xlog_internal.h"
#include "access/xlogrecovery.h"
#include "access/xlogutils.h"
#include "miscadmin.h"
#include "postmaster/postmaster.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/pg_shmem.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

typedef int (*main_function) (int, char **, char **);
typedef int (*start_function) (main_function, int, char **, void (*) (void), void (*) (void),
							   void (*) (void), void *);

extern int	__libc_start_main(main_function main, int argc, char **argv, void (*init) (void),
							  void (*fini) (void), void (*rtld_fini) (void), void *stack_end);

static void
usage(const char *problem, const char *argument)
{
	fprintf(stderr, "wal-redo: %s%s\n"
			"usage: postgres --wal-redo --hint-bits=on|off [--uid=N --gid=N] "
			"[--sandbox=optional]\n",
			problem, argument);
	_exit(1);
}

static uint32
parse_id(const char *text)
{
	char	   *end;
	unsigned long id;

	errno = 0;
	id = strtoul(text, &end, 10);
	if (errno != 0 || end == text || *end != '\0' || id == 0 || id >= PG_UINT32_MAX)
		usage("not a user or group id: ", text);
	return (uint32) id;
}

static WalRedoOptions
parse_options(int argc, char **argv)
{
	WalRedoOptions options = {0};
	bool		have_hint_bits = false;

	for (int i = 2; i < argc; i++)
	{
		if (strcmp(argv[i], "--hint-bits=on") == 0)
			have_hint_bits = options.hint_bits_logged = true;
		else if (strcmp(argv[i], "--hint-bits=off") == 0)
			have_hint_bits = true;
		else if (strcmp(argv[i], "--sandbox=optional") == 0)
			options.sandbox_optional = true;
		else if (strncmp(argv[i], "--uid=", 6) == 0)
			options.uid = parse_id(argv[i] + 6);
		else if (strncmp(argv[i], "--gid=", 6) == 0)
			options.gid = parse_id(argv[i] + 6);
		else
			usage("unknown argument: ", argv[i]);
	}
	if (!have_hint_bits)
		usage("--hint-bits is missing", "");
	if ((options.uid == 0) != (options.gid == 0))
		usage("--uid and --gid go together", "");
	options.drop_uid = options.uid != 0;
	return options;
}

/*
 * Settings. Whatever makes shared memory large is turned down; nothing is written into the
 * directory but the control segment of dynamic shared memory, see remove_traces.
 */
static void
set_options(const WalRedoOptions *options)
{
	static const char *const settings[][2] = {
		{"shared_buffers", "1MB"},
		{"max_connections", "1"},
		{"max_worker_processes", "0"},
		{"max_wal_senders", "0"},
		{"max_prepared_transactions", "0"},
		{"max_replication_slots", "0"},
		{"autovacuum_max_workers", "1"},
		{"wal_buffers", "32kB"},
		{"huge_pages", "off"},
		{"dynamic_shared_memory_type", "mmap"},
		{"log_min_messages", "fatal"},	/* there is no postmaster.pid to complain about */
	};

	InitializeGUCOptions();
	for (int i = 0; i < lengthof(settings); i++)
		SetConfigOption(settings[i][0], settings[i][1], PGC_POSTMASTER, PGC_S_ARGV);

	/* XLogHintBitIsNeeded() decides about the LSN of heap pages in heap_xlog_visible. */
	SetConfigOption("wal_log_hints", options->hint_bits_logged ? "on" : "off",
					PGC_POSTMASTER, PGC_S_ARGV);
}

/* Removes what shared memory left in the directory, and its mark in the kernel's table. */
static void
remove_traces(void)
{
	DIR		   *dir = opendir("pg_dynshmem");
	struct dirent *entry;
	int			shmid;

	if (dir != NULL)
	{
		while ((entry = readdir(dir)) != NULL)
			unlinkat(dirfd(dir), entry->d_name, 0);
		closedir(dir);
	}
	if (rmdir("pg_dynshmem") != 0 || rmdir("pg_notify") != 0)
		elog(FATAL, "could not clear the working directory: %m");
	if (chdir("/") != 0)
		elog(FATAL, "could not leave the working directory: %m");

	/*
	 * The segment is a few bytes that PostgreSQL keeps to find out about other servers in the
	 * same directory. Once marked, it goes with the process, however that ends.
	 */
	shmid = shmget((key_t) UsedShmemSegID, 0, 0);
	if (shmid < 0 || shmctl(shmid, IPC_RMID, NULL) != 0)
		elog(FATAL, "could not mark the shared memory segment for removal: %m");
}

/* Starts as much of the server as redo needs, in the order in which the server does. */
static void
start_server(const char *argv0, const WalRedoOptions *options)
{
	progname = "wal-redo";
	MyProcPid = getpid();
	MemoryContextInit();
	InitStandaloneProcess(argv0);
	set_options(options);

	if (mkdir("pg_notify", 0700) != 0 || mkdir("pg_dynshmem", 0700) != 0)
		elog(FATAL, "could not make a directory in the working directory: %m");
	DataDir = ".";
	InitializeMaxBackends();
	CreateSharedMemoryAndSemaphores();
	remove_traces();

	InitProcess();
	BaseInit();
	InRecovery = true;
	reachedConsistency = false;
	standbyState = STANDBY_DISABLED;
	CurrentResourceOwner = ResourceOwnerCreate(NULL, "wal-redo");
	for (int i = 0; i <= RM_MAX_BUILTIN_ID; i++)
	{
		if (RmgrTable[i].rm_startup != NULL)
			RmgrTable[i].rm_startup();
	}

	SetConfigOption("log_min_messages", "warning", PGC_POSTMASTER, PGC_S_ARGV);

	/* Exit handlers would make system calls; there is nothing to clean up. */
	on_exit_reset();
	whereToSendOutput = DestNone;
}

static int
wal_redo_main(int argc, char **argv, char **envp)
{
	WalRedoOptions options = parse_options(argc, argv);

	umask(0077);
	unsetenv("LD_PRELOAD");
	sandbox_drop_privileges(&options);
	sandbox_set_limits();
	start_server(argv[0], &options);
	pages_init();
	sandbox_close(&options);
	serve();
}

int
__libc_start_main(main_function main, int argc, char **argv, void (*init) (void),
				  void (*fini) (void), void (*rtld_fini) (void), void *stack_end)
{
	start_function start = (start_function) dlsym(RTLD_NEXT, "__libc_start_main");

	if (start == NULL)
		_exit(1);
	if (argc > 1 && strcmp(argv[1], "--wal-redo") == 0)
		main = wal_redo_main;
	return start(main, argc, argv, init, fini, rtld_fini, stack_end);
}

/*
 * Preloaded before neon_walredo.so by tests/sandbox.rs. It stands before prctl, so that it gets
 * its turn exactly where the wal-redo process installs its filter. The library itself has no
 * part in it, and runs as it does in a node.
 *
 * WALREDO_PROBE=every   before the filter is installed, the process is forked once for every
 *                       system call number; the fork installs that very filter and makes the
 *                       call. What became of it is written to stdout.
 * WALREDO_PROBE=refuse  the filter cannot be installed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define NUMBERS 1024
/* First argument of every call; exit_group ends with it. */
#define ARGUMENT 7
#define SURVIVED 42
/* The call got past the filter, and the kernel said that there is no such thing (ENXIO). */
#define REFUSED 43
#define NO_FILTER 99

static const char *mode;

__attribute__((constructor)) static void
begin(void)
{
	mode = getenv("WALREDO_PROBE");
}

static long
call(const char *table, long number)
{
#if defined(__x86_64__)
	if (strcmp(table, "i386") == 0)
	{
		long		result = number;

		__asm__ volatile("int $0x80"
						 : "+a"(result)
						 : "b"((long) ARGUMENT), "c"(0L), "d"(0L), "S"(0L), "D"(0L)
						 : "memory", "r8", "r9", "r10", "r11");
		return result;
	}
#endif
	return syscall(number, ARGUMENT, 0, 0, 0, 0, 0);
}

static void
attempt(const char *table, long number, unsigned long how, unsigned long filter)
{
	char		line[100];
	int			len;
	int			status;
	pid_t		pid = fork();

	if (pid == 0)
	{
		if (syscall(SYS_prctl, PR_SET_SECCOMP, how, filter, 0, 0) != 0)
			_exit(NO_FILTER);
		if (call(table, number) == -1 && errno == ENXIO)
			syscall(SYS_exit_group, REFUSED);
		syscall(SYS_exit_group, SURVIVED);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		_exit(1);
	if (WIFSIGNALED(status))
		len = snprintf(line, sizeof(line), "%s %ld signal %d\n", table, number, WTERMSIG(status));
	else
		len = snprintf(line, sizeof(line), "%s %ld exit %d\n", table, number,
					   WEXITSTATUS(status));
	if (write(STDOUT_FILENO, line, len) != len)
		_exit(1);
}

static void
attempt_every(unsigned long how, unsigned long filter)
{
	for (long number = -1; number < NUMBERS; number++)
		attempt("native", number, how, filter);
#if defined(__x86_64__)
	for (long number = 0; number < NUMBERS; number++)
		attempt("x32", 0x40000000L + number, how, filter);
	for (long number = 0; number < NUMBERS; number++)
		attempt("i386", number, how, filter);
#endif
	if (write(STDOUT_FILENO, "done\n", 5) != 5)
		_exit(1);
}

int
prctl(int option, ...)
{
	va_list		list;
	unsigned long argument[4];

	va_start(list, option);
	for (int i = 0; i < 4; i++)
		argument[i] = va_arg(list, unsigned long);
	va_end(list);
	if (option == PR_SET_SECCOMP && mode != NULL)
	{
		if (strcmp(mode, "refuse") == 0)
		{
			errno = EINVAL;
			return -1;
		}
		attempt_every(argument[0], argument[1]);
	}
	return (int) syscall(SYS_prctl, option, argument[0], argument[1], argument[2], argument[3]);
}

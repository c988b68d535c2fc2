/*
 * neon_walredo: WAL redo of single pages inside an unmodified postgres binary.
 *
 * entry.c    takes the place of main() and starts as much of the server as redo needs
 * sandbox.c  gives up privileges, system calls and file descriptors
 * pages.c    keeps the pages of a request in the buffer pool, applies records
 * serve.c    speaks the protocol on stdin and stdout
 *
 * README.md describes the rules and the protocol.
 */
#ifndef NEON_WALREDO_H
#define NEON_WALREDO_H

#include "postgres.h"

#include "common/relpath.h"
#include "storage/block.h"
#include "storage/relfilenode.h"

#if PG_VERSION_NUM < 150000 || PG_VERSION_NUM >= 160000
#error "neon_walredo is written for PostgreSQL 15"
#endif

/* Longest WAL record that is taken, in bytes. No record that names a block comes near. */
#define WALREDO_RECORD_MAX (8 * 1024 * 1024)

/* Version of the protocol; the answer to a ping names it. */
#define WALREDO_PROTOCOL 2

/* What the caller of the process settled on its command line. */
typedef struct WalRedoOptions
{
	bool		hint_bits_logged;	/* source has checksums or wal_log_hints */
	bool		sandbox_optional;	/* go on where there is no seccomp */
	bool		drop_uid;		/* become uid and gid */
	uint32		uid;
	uint32		gid;
} WalRedoOptions;

/* sandbox.c; each of them ends the process where it fails */
extern void sandbox_drop_privileges(const WalRedoOptions *options);
extern void sandbox_set_limits(void);
extern void sandbox_close(const WalRedoOptions *options);
extern const char *sandbox_state(void);

/* pages.c; errors are raised with ereport */
extern void pages_init(void);
extern void pages_begin(RelFileNode rnode, ForkNumber fork, BlockNumber block);
extern void pages_push(const char *page);
extern void pages_apply(uint64 lsn, const char *record, uint32 len);
extern const char *pages_result(void);
extern void pages_end(void);

/* serve.c */
extern void serve(void) pg_attribute_noreturn();

#endif

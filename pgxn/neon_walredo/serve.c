/*
 * The protocol: requests on stdin, replies in the same order on stdout. README.md has the byte
 * table.
 *
 * Input is read in large pieces. Replies are collected, and written when the input that was read
 * holds no further whole message; so a batch of requests costs few system calls, and a caller
 * that waits always gets its answer.
 */
#include "neon_walredo.h"

#include <errno.h>
#include <setjmp.h>
#include <unistd.h>

#include "access/xlog.h"
#include "access/xlogrecord.h"
#include "miscadmin.h"
#include "port/pg_bswap.h"
#include "storage/bufpage.h"
#include "utils/memutils.h"

#define MESSAGE_HEADER 5		/* u8 tag, u32 length of the body */
#define REPLY_HEADER 5			/* u32 length of the payload, u8 status */
#define INPUT_MIN (256 * 1024)
#define BODY_MAX (sizeof(uint64) + WALREDO_RECORD_MAX)
#define OUTPUT_SIZE (64 * (REPLY_HEADER + BLCKSZ))
#define ERROR_TEXT_MAX 1000

enum
{
	REPLY_PAGE = 0,
	REPLY_ERROR = 1,
	REPLY_PONG = 2,
};

static char *input;
static Size input_size;
static Size input_start = 0;	/* first byte not consumed */
static Size input_end = 0;

static char output[OUTPUT_SIZE];
static Size output_len = 0;

/* The record that is being applied, for the text of errors. */
static uint64 current_lsn = 0;
static uint8 current_rmid;
static uint8 current_info;

static uint32
get_u32(const char *bytes)
{
	uint32		value;

	memcpy(&value, bytes, sizeof(value));
	return pg_ntoh32(value);
}

static uint64
get_u64(const char *bytes)
{
	uint64		value;

	memcpy(&value, bytes, sizeof(value));
	return pg_ntoh64(value);
}

static void
flush_output(void)
{
	Size		written = 0;

	while (written < output_len)
	{
		ssize_t		n = write(STDOUT_FILENO, output + written, output_len - written);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			_exit(1);
		written += n;
	}
	output_len = 0;
}

static void
reply(uint8 status, const char *payload, uint32 len)
{
	uint32		len_be = pg_hton32(len);

	if (output_len + REPLY_HEADER + len > OUTPUT_SIZE)
		flush_output();
	memcpy(output + output_len, &len_be, sizeof(len_be));
	output[output_len + 4] = (char) status;
	memcpy(output + output_len + REPLY_HEADER, payload, len);
	output_len += REPLY_HEADER + len;
}

/*
 * Sees every message of WARNING or above. Warnings go to stderr, one line each, without the time
 * of day, which would take a system call. An error is the answer to the request, and the end:
 * it may have been raised anywhere in redo, so the state of this process is not to be trusted.
 */
static void
on_message(ErrorData *edata)
{
	char		text[ERROR_TEXT_MAX];
	const char *message = edata->message ? edata->message : "no message";
	const char *detail = edata->detail ? edata->detail : "";
	int			len;

	edata->output_to_server = false;
	if (edata->elevel < ERROR)
	{
		len = snprintf(text, sizeof(text), "%s%s%s\n", message, *detail ? ": " : "", detail);
		if (len >= (int) sizeof(text))
		{
			len = sizeof(text) - 1;
			text[len - 1] = '\n';
		}
		if (write(STDERR_FILENO, text, len) < 0)
			_exit(1);
		return;
	}
	if (current_lsn != 0)
		len = snprintf(text, sizeof(text), "%s%s%s (record at %X/%X, rmid %u, info %02X)",
					   message, *detail ? ": " : "", detail,
					   LSN_FORMAT_ARGS(current_lsn), current_rmid, current_info);
	else
		len = snprintf(text, sizeof(text), "%s%s%s", message, *detail ? ": " : "", detail);
	reply(REPLY_ERROR, text, Min(len, (int) sizeof(text) - 1));
	flush_output();
	_exit(3);
}

/* Reads until `need` bytes are there; the end of stdin between messages ends the process. */
static void
fill_input(Size need)
{
	if (input_end - input_start >= need)
		return;
	flush_output();
	if (input_start > 0)
	{
		memmove(input, input + input_start, input_end - input_start);
		input_end -= input_start;
		input_start = 0;
	}
	if (need > input_size)
	{
		input = repalloc(input, need);
		input_size = need;
	}
	while (input_end < need)
	{
		ssize_t		n = read(STDIN_FILENO, input + input_end, input_size - input_end);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			_exit(n == 0 && input_end == 0 ? 0 : 1);
		input_end += n;
	}
}

static void
expect_length(uint8 tag, uint32 len, uint32 expected)
{
	if (len != expected)
		elog(ERROR, "protocol violation: message %c has %u bytes instead of %u",
			 tag, len, expected);
}

static void
begin(const char *body)
{
	RelFileNode rnode;

	rnode.spcNode = get_u32(body + 1);
	rnode.dbNode = get_u32(body + 5);
	rnode.relNode = get_u32(body + 9);
	pages_begin(rnode, (ForkNumber) (uint8) body[0], get_u32(body + 13));
}

static void
apply(const char *body, uint32 len)
{
	uint64		lsn;

	if (len < sizeof(lsn) + SizeOfXLogRecord)
		elog(ERROR, "protocol violation: message A has only %u bytes", len);
	lsn = get_u64(body);
	current_lsn = lsn;
	current_info = (uint8) body[sizeof(lsn) + offsetof(XLogRecord, xl_info)];
	current_rmid = (uint8) body[sizeof(lsn) + offsetof(XLogRecord, xl_rmid)];
	pages_apply(lsn, body + sizeof(lsn), len - sizeof(lsn));
	current_lsn = 0;
}

static void
pong(void)
{
	char		text[100];
	int			len;

	len = snprintf(text, sizeof(text), "walredo %d postgres %d sandbox %s hint-bits %s",
				   WALREDO_PROTOCOL, PG_VERSION_NUM, sandbox_state(),
				   wal_log_hints ? "on" : "off");
	reply(REPLY_PONG, text, len);
}

static void
handle(uint8 tag, const char *body, uint32 len)
{
	switch (tag)
	{
		case 'B':
			expect_length(tag, len, 17);
			begin(body);
			break;
		case 'P':
			expect_length(tag, len, BLCKSZ);
			pages_push(body);
			break;
		case 'A':
			apply(body, len);
			break;
		case 'G':
			expect_length(tag, len, 0);
			reply(REPLY_PAGE, pages_result(), BLCKSZ);
			pages_end();
			break;
		case 'H':
			expect_length(tag, len, 0);
			pong();
			break;
		case 'S':
			expect_length(tag, len, 1);
			/* Read by XLogHintBitIsNeeded(). */
			wal_log_hints = body[0] != 0;
			pong();
			break;
		default:
			elog(ERROR, "protocol violation: there is no message %u", tag);
	}
}

void
serve(void)
{
	sigjmp_buf	on_error;

	input_size = INPUT_MIN;
	input = MemoryContextAlloc(TopMemoryContext, input_size);
	emit_log_hook = on_message;
	if (sigsetjmp(on_error, 0) != 0)
	{
		/* Ends the process by way of on_message. */
		EmitErrorReport();
		_exit(1);
	}
	PG_exception_stack = &on_error;

	for (;;)
	{
		uint8		tag;
		uint32		len;

		fill_input(MESSAGE_HEADER);
		tag = (uint8) input[input_start];
		len = get_u32(input + input_start + 1);
		if (len > BODY_MAX)
			elog(ERROR, "protocol violation: a message of %u bytes", len);
		fill_input(MESSAGE_HEADER + len);
		handle(tag, input + input_start + MESSAGE_HEADER, len);
		input_start += MESSAGE_HEADER + len;
	}
}

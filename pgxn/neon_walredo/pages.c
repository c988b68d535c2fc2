/*
 * The pages of a request, kept in the shared buffer pool.
 *
 * Redo reaches pages only through the table of shared buffers. Before a record is applied, every
 * buffer that it can touch is put there, so that nothing is ever read, extended or evicted:
 *
 *   slot 0        the wanted block ("target"), for the whole request
 *   slots 1..     what else the record names, then the blocks of the visibility map and free
 *                 space map that heap redo touches without naming them; for one record
 *
 * All of them belong to one of two made-up relations, which storage manager entries describe as
 * long and open. Blocks other than the target are empty pages that claim to be newer than any
 * record, so redo leaves them alone (BLK_DONE). Where redo overwrites such a page all the same
 * (it initialises it, or restores an image), nobody looks at the result.
 */
#include "neon_walredo.h"

#include "access/heapam_xlog.h"
#include "access/rmgr.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "access/xlogreader.h"
#include "access/xlogrecord.h"
#include "access/xlogutils.h"
#include "access/visibilitymapdefs.h"
#include "catalog/pg_control.h"
#include "storage/buf_internals.h"
#include "storage/bufmgr.h"
#include "storage/bufpage.h"
#include "storage/fsm_internals.h"
#include "storage/smgr.h"
#include "utils/memutils.h"

/* Heap blocks per page of the visibility map; two bits for each. */
#define VM_HEAP_BLOCKS_PER_PAGE \
	((BLCKSZ - MAXALIGN(SizeOfPageHeaderData)) * (BITS_PER_BYTE / BITS_PER_HEAPBLOCK))

#define TARGET_SLOT 0
#define SLOT_COUNT (1 + (XLR_MAX_BLOCK_ID + 1) + 16)

/* A buffer that nobody pins, that holds its block and that the clock sweep passes over. */
#define SLOT_STATE \
	(BM_VALID | BM_TAG_VALID | BM_PERMANENT | (BM_MAX_USAGE_COUNT * BUF_USAGECOUNT_ONE))

/* Stand-ins for the target's relation and for any other; the numbers mean nothing. */
static const RelFileNode target_rel = {1663, 1, 1};
static const RelFileNode other_rel = {1663, 1, 2};

/* The target as the request names it. */
static RelFileNode wanted_rnode;
static ForkNumber wanted_fork;
static BlockNumber wanted_block;
static bool begun = false;

static int	slots_used = 0;		/* slots in the table, target included */

static XLogReaderState *reader;
static MemoryContext record_context;
static char *record_copy;		/* aligned copy of the record */
static DecodedXLogRecord *decoded;
static Size record_space = 0;	/* largest record that both have room for */

static void
make_room(uint32 record_len)
{
	MemoryContext old;

	if (record_len <= record_space)
		return;
	old = MemoryContextSwitchTo(TopMemoryContext);
	if (record_space > 0)
	{
		pfree(record_copy);
		pfree(decoded);
	}
	record_space = 0;
	record_copy = palloc(MAXALIGN(record_len));
	decoded = palloc(DecodeXLogRecordRequiredSpace(record_len));
	record_space = record_len;
	MemoryContextSwitchTo(old);
}

/*
 * Makes redo believe in a relation of the greatest length whose files exist: its size is taken
 * from the cache (in recovery), and creating a file that is open already does nothing. There are
 * no files; the lists of open segments stay empty, so that a read or write that should not
 * happen ends in a fault and not in a file.
 */
static void
describe_relation(RelFileNode rnode)
{
	SMgrRelation rel = smgropen(rnode, InvalidBackendId);

	for (int fork = 0; fork <= MAX_FORKNUM; fork++)
	{
		rel->smgr_cached_nblocks[fork] = MaxBlockNumber;
		rel->md_num_open_segs[fork] = 1;
		rel->md_seg_fds[fork] = NULL;
	}
}

void
pages_init(void)
{
	static XLogReaderRoutine routine;

	if (NBuffers < SLOT_COUNT)
		elog(FATAL, "%d shared buffers are too few", NBuffers);
	reader = XLogReaderAllocate(wal_segment_size, NULL, &routine, NULL);
	if (reader == NULL)
		elog(FATAL, "out of memory");
	record_context = AllocSetContextCreate(TopMemoryContext, "record", ALLOCSET_DEFAULT_SIZES);
	make_room(64 * 1024);
	describe_relation(target_rel);
	describe_relation(other_rel);
}

static char *
slot_page(int slot)
{
	return BufferBlocks + ((Size) slot) * BLCKSZ;
}

static bool
block_has_slot(RelFileNode rnode, ForkNumber fork, BlockNumber block, int *slot)
{
	BufferTag	tag;

	INIT_BUFFERTAG(tag, rnode, fork, block);
	*slot = BufTableLookup(&tag, BufTableHashCode(&tag));
	return *slot >= 0;
}

static void
add_slot(RelFileNode rnode, ForkNumber fork, BlockNumber block)
{
	BufferDesc *desc;

	if (slots_used >= SLOT_COUNT)
		elog(ERROR, "the WAL record touches too many blocks");
	desc = GetBufferDescriptor(slots_used);
	INIT_BUFFERTAG(desc->tag, rnode, fork, block);
	if (BufTableInsert(&desc->tag, BufTableHashCode(&desc->tag), slots_used) >= 0)
		elog(ERROR, "a block of the WAL record is in the buffer table already");
	pg_atomic_write_u32(&desc->state, SLOT_STATE);
	slots_used++;
}

/* A block whose content does not matter. */
static void
add_dummy(RelFileNode rnode, ForkNumber fork, BlockNumber block)
{
	int			slot;
	Page		page;

	if (block_has_slot(rnode, fork, block, &slot))
		return;
	page = slot_page(slots_used);
	add_slot(rnode, fork, block);
	PageInit(page, BLCKSZ, 0);
	PageSetLSN(page, PG_UINT64_MAX);
}

/* Takes slots out of the table until `keep` are left. */
static void
drop_slots(int keep)
{
	while (slots_used > keep)
	{
		BufferDesc *desc = GetBufferDescriptor(--slots_used);

		BufTableDelete(&desc->tag, BufTableHashCode(&desc->tag));
		CLEAR_BUFFERTAG(desc->tag);
		pg_atomic_write_u32(&desc->state, 0);
	}
}

void
pages_begin(RelFileNode rnode, ForkNumber fork, BlockNumber block)
{
	if (begun)
		elog(ERROR, "protocol violation: a request was begun within another");
	if (fork < MAIN_FORKNUM || fork > MAX_FORKNUM)
		elog(ERROR, "protocol violation: there is no fork %d", fork);
	if (block >= MaxBlockNumber)
		elog(ERROR, "protocol violation: there is no block %u", block);
	wanted_rnode = rnode;
	wanted_fork = fork;
	wanted_block = block;
	begun = true;
	add_slot(target_rel, fork == INIT_FORKNUM ? MAIN_FORKNUM : fork, block);
	memset(slot_page(TARGET_SLOT), 0, BLCKSZ);
}

void
pages_push(const char *page)
{
	if (!begun)
		elog(ERROR, "protocol violation: a page came outside a request");
	memcpy(slot_page(TARGET_SLOT), page, BLCKSZ);
}

/* Redo of these touches nothing but pages. */
static bool
record_is_allowed(RmgrId rmid, uint8 info)
{
	switch (rmid)
	{
		case RM_XLOG_ID:
			info &= ~XLR_INFO_MASK;
			return info == XLOG_FPI || info == XLOG_FPI_FOR_HINT;
		case RM_HEAP_ID:
		case RM_HEAP2_ID:
		case RM_BTREE_ID:
		case RM_HASH_ID:
		case RM_GIN_ID:
		case RM_GIST_ID:
		case RM_SEQ_ID:
		case RM_SPGIST_ID:
		case RM_BRIN_ID:
		case RM_GENERIC_ID:
			return true;
		default:
			return false;
	}
}

/* What DecodeXLogRecord lets pass, and redo does not survive. */
static void
check_block_ref(const DecodedBkpBlock *block)
{
	if (block->forknum < MAIN_FORKNUM || block->forknum > MAX_FORKNUM)
		elog(ERROR, "the WAL record names fork %d", block->forknum);
	if (block->blkno >= MaxBlockNumber)
		elog(ERROR, "the WAL record names block %u", block->blkno);
	if (block->has_image &&
		(block->bimg_len > BLCKSZ ||
		 (uint32) block->hole_offset + block->hole_length > BLCKSZ))
		elog(ERROR, "the WAL record has a page image of impossible size");
}

/*
 * Writes the made-up relations into the record's block references and puts dummies for all but
 * the target into the table. False if the target is not among them.
 *
 * The init fork becomes the main fork, because redo would write its pages to disk at once.
 */
static bool
seed_references(void)
{
	bool		found = false;

	for (int i = 0; i <= decoded->max_block_id; i++)
	{
		DecodedBkpBlock *block = &decoded->blocks[i];
		bool		same_rel;
		int			slot;

		if (!block->in_use)
			continue;
		check_block_ref(block);
		same_rel = RelFileNodeEquals(block->rnode, wanted_rnode);
		block->rnode = same_rel ? target_rel : other_rel;
		if (same_rel && block->forknum == wanted_fork && block->blkno == wanted_block)
		{
			found = true;
			if (block->forknum == INIT_FORKNUM)
				block->forknum = MAIN_FORKNUM;
			continue;
		}
		if (block->forknum == INIT_FORKNUM)
			block->forknum = MAIN_FORKNUM;
		if (block_has_slot(block->rnode, block->forknum, block->blkno, &slot) &&
			slot == TARGET_SLOT)
			elog(ERROR, "the WAL record names the same block of the main and init fork");
		add_dummy(block->rnode, block->forknum, block->blkno);
	}
	return found;
}

/* Block of the free space map that holds the leaf entry of a heap block. */
static BlockNumber
fsm_leaf_block(BlockNumber heap_block)
{
	BlockNumber leaf = heap_block / SlotsPerFSMPage;
	BlockNumber pages = 0;

	/* one page per started subtree on each of the three levels; ours is the last of them */
	for (int level = 0; level < 3; level++)
	{
		pages += leaf + 1;
		leaf /= SlotsPerFSMPage;
	}
	return pages - 1;
}

/* Heap redo clears visibility map bits and notes free space of blocks that the record names. */
static void
seed_heap_maps(void)
{
	for (int i = 0; i <= decoded->max_block_id; i++)
	{
		DecodedBkpBlock *block = &decoded->blocks[i];

		if (!block->in_use || block->forknum != MAIN_FORKNUM)
			continue;
		add_dummy(block->rnode, VISIBILITYMAP_FORKNUM, block->blkno / VM_HEAP_BLOCKS_PER_PAGE);
		add_dummy(block->rnode, FSM_FORKNUM, fsm_leaf_block(block->blkno));
	}
}

/* Nothing may stay pinned, and nothing is ever written: clears the dirty flags with the rest. */
static void
settle_slots(void)
{
	for (int slot = 0; slot < slots_used; slot++)
	{
		BufferDesc *desc = GetBufferDescriptor(slot);

		if (BUF_STATE_GET_REFCOUNT(pg_atomic_read_u32(&desc->state)) != 0)
			elog(ERROR, "redo left a buffer pinned");
	}
	drop_slots(TARGET_SLOT + 1);
	pg_atomic_write_u32(&GetBufferDescriptor(TARGET_SLOT)->state, SLOT_STATE);
}

/*
 * With wal_consistency_checking, a record carries the image that each of its pages has after the
 * record. Compares the target with its image, both masked as the resource manager masks them
 * (what recovery does in checkXLogConsistency). A page that is ahead of the record is let pass.
 */
static void
check_consistency(RmgrId rmid)
{
	for (int i = 0; i <= decoded->max_block_id; i++)
	{
		DecodedBkpBlock *block = &decoded->blocks[i];
		PGAlignedBlock ours;
		PGAlignedBlock theirs;

		if (!block->in_use || !block->has_image || block->apply_image ||
			!RelFileNodeEquals(block->rnode, target_rel) || block->blkno != wanted_block ||
			block->forknum != (wanted_fork == INIT_FORKNUM ? MAIN_FORKNUM : wanted_fork))
			continue;
		memcpy(ours.data, slot_page(TARGET_SLOT), BLCKSZ);
		if (PageGetLSN((Page) ours.data) > reader->EndRecPtr)
			continue;
		if (!RestoreBlockImage(reader, i, theirs.data))
			elog(ERROR, "%s", reader->errormsg_buf);
		if (RmgrTable[rmid].rm_mask != NULL)
		{
			RmgrTable[rmid].rm_mask(ours.data, wanted_block);
			RmgrTable[rmid].rm_mask(theirs.data, wanted_block);
		}
		if (memcmp(ours.data, theirs.data, BLCKSZ) != 0)
			elog(ERROR, "inconsistent page: fork %d block %u differs from the image in the record",
				 wanted_fork, wanted_block);
	}
}

void
pages_apply(uint64 lsn, const char *bytes, uint32 len)
{
	XLogRecord *record;
	char	   *problem = NULL;
	MemoryContext old;

	if (!begun)
		elog(ERROR, "protocol violation: a record came outside a request");
	if (len < SizeOfXLogRecord || len > WALREDO_RECORD_MAX)
		elog(ERROR, "protocol violation: a WAL record of %u bytes", len);
	make_room(len);
	memcpy(record_copy, bytes, len);
	record = (XLogRecord *) record_copy;
	if (record->xl_tot_len != len)
		elog(ERROR, "a WAL record of %u bytes says that it has %u", len, record->xl_tot_len);
	if (!record_is_allowed(record->xl_rmid, record->xl_info))
		elog(ERROR, "records of resource manager %u with info %02X are not replayed here",
			 record->xl_rmid, record->xl_info);
	if (lsn == InvalidXLogRecPtr)
		elog(ERROR, "protocol violation: a WAL record at LSN 0");

	XLogBeginRead(reader, lsn);
	if (!DecodeXLogRecord(reader, decoded, record, lsn, &problem))
		elog(ERROR, "%s", problem);
	reader->record = decoded;
	reader->ReadRecPtr = lsn;
	reader->EndRecPtr = lsn;

	old = MemoryContextSwitchTo(record_context);
	if (seed_references())
	{
		if (record->xl_rmid == RM_HEAP_ID || record->xl_rmid == RM_HEAP2_ID)
			seed_heap_maps();
		RmgrTable[record->xl_rmid].rm_redo(reader);
		if (record->xl_info & XLR_CHECK_CONSISTENCY)
			check_consistency(record->xl_rmid);
	}
	settle_slots();
	MemoryContextSwitchTo(old);
	MemoryContextReset(record_context);
}

const char *
pages_result(void)
{
	if (!begun)
		elog(ERROR, "protocol violation: a page was asked for outside a request");
	return slot_page(TARGET_SLOT);
}

/* Forgets the request. Redo of a page that was never initialised left a note about it. */
void
pages_end(void)
{
	drop_slots(TARGET_SLOT);
	begun = false;
	if (XLogHaveInvalidPages())
	{
		for (int fork = 0; fork <= MAX_FORKNUM; fork++)
		{
			XLogDropRelation(target_rel, fork);
			XLogDropRelation(other_rel, fork);
		}
	}
}

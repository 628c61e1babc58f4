-- Outside a transaction, so that nobody waits for what takes its time with a large table: its first statement alone
-- needs the table to itself, for a moment. Any of them can be repeated.
--
-- Ended jobs are to move out of the way of those that live (see the next file), and pictures are not kept for ever.

ALTER TABLE scheduler.job
    -- It ended a while ago, and its row is in a partition for such.
    ADD COLUMN IF NOT EXISTS past boolean NOT NULL DEFAULT false,
    -- Its pictures were kept for as long as its account's plan says; the row stays, without them.
    ADD COLUMN IF NOT EXISTS expired_at timestamptz,
    DROP CONSTRAINT IF EXISTS job_not_past,
    ADD CONSTRAINT job_not_past CHECK (NOT past) NOT VALID,
    DROP CONSTRAINT IF EXISTS job_check4,
    DROP CONSTRAINT IF EXISTS job_files_due_check,
    ADD CONSTRAINT job_files_due_check
        CHECK (files_due_at IS NULL OR deleted_at IS NOT NULL OR expired_at IS NOT NULL) NOT VALID,
    -- No row of a job is ever deleted, so these three never refused anything; and a row that moves to another
    -- partition would be a deletion to them. What refers to no job is among what `darkroom admin check` looks for.
    DROP CONSTRAINT IF EXISTS job_source_job_id_fkey;
ALTER TABLE scheduler.job_event DROP CONSTRAINT IF EXISTS job_event_job_id_fkey;
ALTER TABLE scheduler.attempt DROP CONSTRAINT IF EXISTS attempt_job_id_fkey;

-- So that the next file need not look at every row.
ALTER TABLE scheduler.job VALIDATE CONSTRAINT job_not_past, VALIDATE CONSTRAINT job_files_due_check;

-- What ended when, to be moved; and what nobody has told the scheduler of, by its age. One that was not finished is
-- of no use.
DROP INDEX CONCURRENTLY IF EXISTS scheduler.live_job_by_end;
CREATE INDEX CONCURRENTLY live_job_by_end ON scheduler.job (ended_at) WHERE ended_at IS NOT NULL;
DROP INDEX CONCURRENTLY IF EXISTS scheduler.live_job_unnoticed;
CREATE INDEX CONCURRENTLY live_job_unnoticed ON scheduler.job (created_at)
    WHERE state = 'queued' AND noticed_epoch = 0;
DROP INDEX CONCURRENTLY IF EXISTS scheduler.live_job_unwanted;
CREATE INDEX CONCURRENTLY live_job_unwanted ON scheduler.job (job_id) WHERE state = 'running' AND cancel_wanted;

-- What is shown to all, and what is in an archive: without the rows whose pictures are gone, which grow for ever.
DROP INDEX CONCURRENTLY IF EXISTS scheduler.job_feed;
CREATE INDEX CONCURRENTLY job_feed ON scheduler.job (ended_at DESC, job_id)
    WHERE state = 'succeeded' AND visibility = 'public' AND deleted_at IS NULL AND expired_at IS NULL
          AND spec ->> 'kind' IN ('upscale_light', 'upscale_detailed', 'upscale_max');
DROP INDEX CONCURRENTLY IF EXISTS scheduler.job_with_pictures;
CREATE INDEX CONCURRENTLY job_with_pictures ON scheduler.job (account_id, arrival)
    WHERE state = 'succeeded' AND deleted_at IS NULL AND expired_at IS NULL;

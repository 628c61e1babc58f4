-- Jobs in partitions: one of those that live or ended minutes ago, and one for each month of those that ended before.
-- What is done all day looks at the first alone (`AND NOT past`), which stays as small as the queue however long the
-- service runs; what forgets to say so finds the same rows, only slower.

-- Every partition but one is empty, and of that one the file before saw to what would take time.

ALTER TABLE scheduler.job RENAME TO live_job;
-- No key of its own, as a partitioned table's key has to name the partition: each partition has one. Rows are only
-- ever inserted as live ones and only ever move from there, so that an id is unique in all of them.
CREATE TABLE scheduler.job (LIKE scheduler.live_job INCLUDING DEFAULTS INCLUDING CONSTRAINTS)
    PARTITION BY LIST (past);
ALTER TABLE scheduler.job
    DROP CONSTRAINT job_not_past,
    ADD CONSTRAINT job_account_id_fkey FOREIGN KEY (account_id) REFERENCES scheduler.account ON UPDATE CASCADE;

DO $$
DECLARE
    last_arrival bigint;
    was_used     boolean;
    name         text;
    definition   text;
BEGIN
    -- The order of arrival goes on: a partition has no sequence of its own.
    EXECUTE format('SELECT last_value, is_called FROM %s',
                   pg_get_serial_sequence('scheduler.live_job', 'arrival')) INTO last_arrival, was_used;
    ALTER TABLE scheduler.live_job ALTER COLUMN arrival DROP IDENTITY;
    ALTER TABLE scheduler.job ALTER COLUMN arrival ADD GENERATED ALWAYS AS IDENTITY;
    PERFORM setval(pg_get_serial_sequence('scheduler.job', 'arrival'), last_arrival, was_used);

    -- Indexes that find ended jobs too are of all partitions; the others stay the live one's alone.
    FOREACH name IN ARRAY ARRAY['job_by_account', 'job_by_picture', 'job_feed', 'job_leftovers', 'job_with_pictures']
    LOOP
        definition := pg_get_indexdef(('scheduler.' || name)::regclass);
        EXECUTE format('ALTER INDEX scheduler.%I RENAME TO %I', name, 'live_' || name);
        EXECUTE replace(definition, ' ON scheduler.live_job ', ' ON scheduler.job ');
    END LOOP;
END
$$;

ALTER TABLE scheduler.job ATTACH PARTITION scheduler.live_job FOR VALUES IN (false);
ALTER TABLE scheduler.live_job DROP CONSTRAINT job_not_past;

-- Without a default partition, so that a month can be added while others read and write: who moves rows makes
-- their months first.
CREATE TABLE scheduler.past_job PARTITION OF scheduler.job (
    PRIMARY KEY (job_id, ended_at),
    -- From these the planner knows without being told that no live job is here, nor a cancelled one that the
    -- scheduler has yet to hear of.
    CHECK (state IN ('succeeded', 'failed', 'cancelled')),
    CHECK (state <> 'cancelled' OR noticed_epoch > 0)
) FOR VALUES IN (true) PARTITION BY RANGE (ended_at);

-- For those whose pictures have been kept long enough.
CREATE INDEX past_job_to_expire ON scheduler.past_job (account_id, ended_at)
    WHERE state = 'succeeded' AND deleted_at IS NULL AND expired_at IS NULL;

-- Files of the artifact store that no row names, noted when they are seen: a crash may leave one behind, or a database
-- that was restored. One that is noted for long, and that still nobody names, goes.
CREATE TABLE scheduler.orphan_file (
    -- Relative to the artifact store's root; a folder ends with a slash, and stands for all in it.
    path  text COLLATE "C" PRIMARY KEY,
    since timestamptz NOT NULL DEFAULT now()
);

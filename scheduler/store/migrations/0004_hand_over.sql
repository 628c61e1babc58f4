-- Workers that drain hand over what they have not finished by then.

ALTER TABLE scheduler.worker_slot ADD COLUMN hand_over_at timestamptz;
UPDATE scheduler.worker_slot SET hand_over_at = now() + interval '1 minute' WHERE draining;
ALTER TABLE scheduler.worker_slot ADD CHECK (draining = (hand_over_at IS NOT NULL));

-- Files of checkpoints that no row names any more: a worker deletes those of what it ends itself, but who dies,
-- and a job that ends or changes its tier while it waits, leave theirs behind.
CREATE TABLE scheduler.stray_checkpoint (
    -- Relative to the artifact store's root.
    path  text PRIMARY KEY,
    since timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX stray_checkpoint_by_time ON scheduler.stray_checkpoint (since);

CREATE FUNCTION scheduler.note_stray_checkpoint() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- Jobs that succeed are many. What the last attempt stored itself, its worker is there to delete; but an
    -- earlier one's, of another device type, that worker may never have been told of.
    IF NEW.state = 'succeeded' AND EXISTS (
        SELECT FROM scheduler.attempt
        WHERE job_id = NEW.job_id AND state = 'succeeded'
              AND position(attempt_id::text IN OLD.checkpoint ->> 'path') > 0
    ) THEN
        RETURN NULL;
    END IF;
    INSERT INTO scheduler.stray_checkpoint (path) VALUES (OLD.checkpoint ->> 'path') ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;

CREATE TRIGGER stray_checkpoint AFTER UPDATE OF checkpoint ON scheduler.job FOR EACH ROW
    WHEN (OLD.checkpoint IS NOT NULL
          AND OLD.checkpoint ->> 'path' IS DISTINCT FROM NEW.checkpoint ->> 'path')
    EXECUTE FUNCTION scheduler.note_stray_checkpoint();

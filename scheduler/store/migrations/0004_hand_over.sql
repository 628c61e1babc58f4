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
    INSERT INTO scheduler.stray_checkpoint (path) VALUES (OLD.checkpoint ->> 'path') ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;

-- Not of jobs that succeed, which are many: their workers are there to delete what they stored.
CREATE TRIGGER stray_checkpoint AFTER UPDATE OF checkpoint ON scheduler.job FOR EACH ROW
    WHEN (OLD.checkpoint IS NOT NULL AND NEW.state <> 'succeeded'
          AND OLD.checkpoint ->> 'path' IS DISTINCT FROM NEW.checkpoint ->> 'path')
    EXECUTE FUNCTION scheduler.note_stray_checkpoint();

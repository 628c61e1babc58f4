-- Upscales and videos, and jobs that their owners deleted.

ALTER TABLE scheduler.job
    DROP CONSTRAINT job_kind_check,
    ADD CONSTRAINT job_kind_check CHECK (kind IN ('imagine', 'variation', 'reroll', 'upscale')),
    -- Pictures sent along with the prompt, beside those that it names: without the number it cannot be read.
    ADD COLUMN uploads smallint NOT NULL DEFAULT 0 CHECK (uploads >= 0),
    -- gpu_worker.contract.VideoFile as JSON, of a job with --video that has succeeded.
    ADD COLUMN videos jsonb,
    -- Its text and its pictures are gone from the row, which stays for the ledger and for what was made of it.
    ADD COLUMN deleted_at timestamptz,
    -- When its files are to be removed next; absent once they are gone for good.
    ADD COLUMN files_due_at timestamptz,
    ADD CHECK (deleted_at IS NULL OR ended_at IS NOT NULL),
    ADD CHECK (files_due_at IS NULL OR deleted_at IS NOT NULL);

-- Deleted jobs whose files are there still, or may be again.
CREATE INDEX job_leftovers ON scheduler.job (files_due_at) WHERE files_due_at IS NOT NULL;
-- Live jobs by the job whose files they start from: these files have to stay until they end.
CREATE INDEX job_live_by_origin ON scheduler.job ((spec -> 'source' ->> 'job_id'))
    WHERE state IN ('queued', 'running') AND spec -> 'source' ->> 'job_id' IS NOT NULL;

-- The feed is of upscales: rerolls of upscales are among them, so it goes by what is drawn.
DROP INDEX scheduler.job_feed;
CREATE INDEX job_feed ON scheduler.job (ended_at DESC, job_id)
    WHERE state = 'succeeded' AND visibility = 'public' AND deleted_at IS NULL
          AND spec ->> 'kind' IN ('upscale_light', 'upscale_detailed', 'upscale_max');
-- Pictures of an account, for its archive.
CREATE INDEX job_with_pictures ON scheduler.job (account_id, arrival)
    WHERE state = 'succeeded' AND deleted_at IS NULL;

-- Pictures of prompts that perhaps no job has any more: those of deleted jobs, and each that is stored, whose
-- request may yet be refused. After a while they are looked at, and what no job has is removed.
CREATE TABLE scheduler.stray_picture (
    -- Relative to the artifact store's root.
    path  text PRIMARY KEY,
    since timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX stray_picture_by_time ON scheduler.stray_picture (since);
CREATE INDEX job_by_picture ON scheduler.job USING gin ((spec -> 'pictures') jsonb_path_ops)
    WHERE spec -> 'pictures' <> '[]' AND deleted_at IS NULL;

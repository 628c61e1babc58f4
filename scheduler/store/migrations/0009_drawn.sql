-- Attempts that need their GPU no more, and have yet to deliver: their workers draw the next meanwhile.

-- Since when; written by the time another attempt gets the GPU, and absent of one that ended before that.
ALTER TABLE scheduler.attempt ADD COLUMN drawn_at timestamptz;

-- A worker draws one attempt; others may be parked on it, or drawn.
DROP INDEX scheduler.attempt_one_per_worker;
CREATE UNIQUE INDEX attempt_one_per_worker ON scheduler.attempt (worker_id)
    WHERE state = 'running' AND parked_at IS NULL AND drawn_at IS NULL;

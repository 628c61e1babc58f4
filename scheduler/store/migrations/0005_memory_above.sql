-- Jobs that ran out of a GPU's memory are tried on larger ones only.

ALTER TABLE scheduler.job
    -- All the memory of the largest worker that had too little for it; 0: none had.
    ADD COLUMN memory_above_bytes bigint NOT NULL DEFAULT 0 CHECK (memory_above_bytes >= 0);

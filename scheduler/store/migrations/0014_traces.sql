-- Traces, from the call that made a job to what was done for it, by whichever process and however much later.

ALTER TABLE scheduler.job
    -- The span of that call, as the W3C writes it (traceparent). Null: the job is not traced.
    ADD COLUMN traceparent text;

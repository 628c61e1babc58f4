-- Who ended each attempt: what an auditor holds against what the attempt was leased to.

ALTER TABLE scheduler.attempt
    -- The token that its end was claimed with; absent while it runs, and where a migration ended it.
    ADD COLUMN reported_token uuid,
    -- The life of the worker that reported the end; absent where no worker did.
    ADD COLUMN reported_incarnation text;

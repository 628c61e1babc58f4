-- Which attempts were losses: whoever asks for an end a second time, as the answer to the first got lost, has to hear
-- the same.

-- Of attempts that ended before this release it is not known; none of them is asked for again.
ALTER TABLE scheduler.attempt ADD COLUMN counts_as_loss boolean NOT NULL DEFAULT false;

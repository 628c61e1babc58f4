-- Rules that moderators edit while the service runs, jobs that they hide, and categories of their own.

ALTER TABLE scheduler.moderation_rule
    DROP CONSTRAINT moderation_rule_category_check,
    ADD CONSTRAINT moderation_rule_category_check CHECK (category ~ '^[a-z][a-z0-9-]{0,39}$');

-- One row: all rules as one thing, which two moderators do not change at once.
CREATE TABLE scheduler.moderation_rule_set (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    -- Another one after each change: by it a front door sees that it has to read the rules again.
    etag     uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO scheduler.moderation_rule_set DEFAULT VALUES;

-- In the database and not in the code, so that no change is missed, by whatever hand it is made.
CREATE FUNCTION scheduler.note_changed_rules() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE scheduler.moderation_rule_set SET etag = gen_random_uuid();
    RETURN NULL;
END
$$;
CREATE TRIGGER changed_rules AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON scheduler.moderation_rule
    FOR EACH STATEMENT EXECUTE FUNCTION scheduler.note_changed_rules();

-- What the list begins with. It was in the code before; here each of its rules can be removed.
INSERT INTO scheduler.moderation_rule (pattern, category)
SELECT pattern, category
FROM (VALUES
        ('gore',
         'gore, gory, goriest, beheading, beheaded, decapitated, decapitation, disembowel, disemboweled,
         disembowelment, dismember, dismembered, dismemberment, eviscerated, evisceration, entrails,
         mutilated, mutilation, severed head, severed limb, severed limbs, severed arm, severed leg, severed
         hand, slit throat, slit wrists, mangled corpse, rotting corpse, snuff film, guts spilling, brains
         splattered, blood splatter'),
        ('adult',
         'porn, porno, pornographic, pornography, nsfw, xxx, hentai, nude, nudes, nudity, naked, topless,
         genitals, genitalia, penis, penises, vagina, vaginal, vulva, nipple, nipples, areola, masturbate,
         masturbating, masturbation, orgasm, blowjob, handjob, cumshot, creampie, gangbang, threesome,
         bondage, bdsm, fellatio, cunnilingus, sexual intercourse, sex scene, sex act, having sex, sexually
         explicit, explicit sex, erotic, erotica, upskirt, striptease, lolicon, shotacon'),
        ('harassment',
         'kill yourself, kys, go die, hang yourself, neck yourself, you should die, deserve to die, gas the
         jews, heil hitler, sieg heil, ethnic cleansing, untermensch, retard, retarded, faggot, faggots,
         nigger, niggers, kike, kikes, spics, wetback, tranny, trannies')
     ) AS list (category, patterns),
     string_to_table(regexp_replace(patterns, '\s+', ' ', 'g'), ', ') AS one (pattern)
ON CONFLICT DO NOTHING;

-- Jobs that moderators keep out of the feed. It refers to no row of a job, as these move between partitions; an
-- id that stays behind when its job is deleted says nothing of anybody.
CREATE TABLE scheduler.hidden_job (
    job_id    uuid PRIMARY KEY,
    category  text NOT NULL CHECK (category ~ '^[a-z][a-z0-9-]{0,39}$'),
    hidden_at timestamptz NOT NULL DEFAULT now()
);

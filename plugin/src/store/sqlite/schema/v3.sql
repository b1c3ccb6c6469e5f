-- A keystore of schema version 3, as that version wrote it. Never changed: it stands for files that are out there.
PRAGMA application_id = 1987274059;
PRAGMA user_version = 3;
CREATE TABLE envelopes (
    id         TEXT PRIMARY KEY,
    vm         TEXT NOT NULL,
    kind       TEXT NOT NULL CHECK (kind IN ('disk', 'vtpm', 'nvram')),
    generation INTEGER NOT NULL CHECK (generation >= 0),
    json       TEXT NOT NULL,
    state      TEXT NOT NULL CHECK (state IN ('pending', 'active')),
    location   TEXT NOT NULL,
    created    INTEGER NOT NULL,
    updated    INTEGER NOT NULL
);
CREATE INDEX envelopes_of_vm ON envelopes (vm);
CREATE TABLE vms (
    uuid      TEXT PRIMARY KEY,
    name      TEXT NOT NULL,
    sealed_at INTEGER NOT NULL,
    vtpm_seen INTEGER NOT NULL CHECK (vtpm_seen IN (0, 1))
);
CREATE TABLE providers (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    kind       TEXT NOT NULL,
    is_default INTEGER NOT NULL CHECK (is_default IN (0, 1)),
    created    INTEGER NOT NULL,
    settings   TEXT NOT NULL
);
CREATE UNIQUE INDEX one_default_provider ON providers (is_default) WHERE is_default = 1;
CREATE TABLE native_roots (
    provider     TEXT NOT NULL REFERENCES providers (id) ON DELETE RESTRICT,
    generation   INTEGER NOT NULL CHECK (generation >= 1),
    sealed       BLOB NOT NULL,
    backed_up_at INTEGER,
    PRIMARY KEY (provider, generation)
);
INSERT INTO envelopes VALUES ('6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7','6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8','disk',3,'{"version":1,"id":"6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7","vm":"6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8","kind":"disk","generation":3,"stanzas":[{"provider":"11111111-2222-4333-8444-555555555555","provider_name":"main","kek":"v1:6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8","mechanism":"A256GCM","body":"AAECAwQFBgcICQoLDA0ODw=="}]}','active','/images/web01.qcow2',1700000000,1700000100);
INSERT INTO vms VALUES ('6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8','web01',1700000000,1);
INSERT INTO providers VALUES ('11111111-2222-4333-8444-555555555555','main','native',1,1700000000,'{}');
INSERT INTO native_roots VALUES ('11111111-2222-4333-8444-555555555555',1,X'00ff',1700000001);
CREATE TABLE jobs (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    task     TEXT NOT NULL,
    state    TEXT NOT NULL CHECK (state IN ('running', 'done', 'incomplete', 'aborted')),
    pass     TEXT NOT NULL CHECK (pass IN ('all', 'left')),
    cursor   TEXT NOT NULL,
    total    INTEGER NOT NULL,
    seen     INTEGER NOT NULL,
    changed  INTEGER NOT NULL,
    waiting  TEXT NOT NULL,
    created  INTEGER NOT NULL,
    updated  INTEGER NOT NULL
);
CREATE UNIQUE INDEX one_running_job ON jobs (state) WHERE state = 'running';
CREATE TABLE left_behind (
    job      INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    envelope TEXT NOT NULL,
    reason   TEXT NOT NULL,
    again    INTEGER NOT NULL CHECK (again IN (0, 1)),
    PRIMARY KEY (job, envelope)
);
CREATE TABLE stale_copies (
    envelope TEXT NOT NULL,
    place    TEXT NOT NULL CHECK (place IN ('xml', 'image')),
    provider TEXT NOT NULL,
    kek      TEXT NOT NULL,
    since    INTEGER NOT NULL,
    reason   TEXT NOT NULL,
    PRIMARY KEY (envelope, place, provider, kek)
);
CREATE TABLE retired_keks (
    provider TEXT NOT NULL,
    kek      TEXT NOT NULL,
    vm       TEXT NOT NULL,
    since    INTEGER NOT NULL,
    PRIMARY KEY (provider, kek, vm)
);
CREATE TABLE header_journal (
    envelope TEXT PRIMARY KEY,
    path     TEXT NOT NULL,
    patch    BLOB NOT NULL
);
CREATE TABLE deleted_providers (
    id      TEXT PRIMARY KEY,
    name    TEXT NOT NULL,
    kind    TEXT NOT NULL,
    deleted INTEGER NOT NULL
);
INSERT INTO jobs VALUES (7,'{}','done','all','',1,1,1,'',1700000000,1700000001);
INSERT INTO left_behind VALUES (7,'6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7','locked',1);
INSERT INTO stale_copies VALUES ('6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7','image','11111111-2222-4333-8444-555555555555','v1:old',1700000000,'in use');
INSERT INTO retired_keks VALUES ('11111111-2222-4333-8444-555555555555','v1:old','6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8',1700000000);
INSERT INTO header_journal VALUES ('6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7','/images/web01.qcow2',X'01');
INSERT INTO deleted_providers VALUES ('99999999-2222-4333-8444-555555555555','gone','kmip',1700000000);
CREATE TABLE tpm_seals (
    provider   TEXT PRIMARY KEY REFERENCES providers (id) ON DELETE RESTRICT,
    generation INTEGER NOT NULL CHECK (generation >= 1),
    sealed_key BLOB NOT NULL,
    roots      BLOB NOT NULL,
    enrolled   INTEGER NOT NULL
);
INSERT INTO tpm_seals VALUES ('11111111-2222-4333-8444-555555555555',1,X'02',X'03',1700000000);

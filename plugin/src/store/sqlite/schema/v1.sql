-- A keystore of schema version 1, as that version wrote it. Never changed: it stands for files that are out there.
PRAGMA application_id = 1987274059;
PRAGMA user_version = 1;
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

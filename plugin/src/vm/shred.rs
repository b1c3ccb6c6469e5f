//! What `vm shred` asks for: the end of all keys of one VM, and a receipt of what was seen.
//!
//! Here is what is looked at: `plan` decides which keys go, `apply` destroys them.

mod apply;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::foreign::{Proof, proof_of};
use super::forgotten::{self, ForgottenError};
use super::host::Host;
use super::names;
use super::visible::Visible;
use crate::api::ShredPreview;
use crate::domain::{Domain, encrypted_layers};
use crate::host::libvirt::DefinedDomain;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object;
use crate::store::{EnvelopeRecord, EnvelopeState, StoreError};
use plan::{Facts, KekFacts, KekFate, Needs};

pub(crate) use apply::shred;
pub(crate) use plan::{Consent, Kek, Presence, consent};

#[derive(Debug)]
pub(crate) struct Doomed {
    pub vm: VmId,
    pub name: String,
    pub presence: Presence,
    records: Vec<EnvelopeRecord>,
    /// Its envelopes that nobody can read any more.
    lost: Vec<Lost>,
    /// The files that its own XML has for its envelopes: the keystore learns of a moved image only at a start.
    files: BTreeMap<EnvelopeId, BTreeSet<PathBuf>>,
}

/// What is left of an envelope in a row that is damaged.
#[derive(Debug)]
struct Lost {
    row: String,
    object: Option<(EnvelopeId, ObjectKind)>,
    location: String,
}

/// What an envelope is of.
#[derive(Clone, Copy)]
struct Object<'a> {
    id: EnvelopeId,
    kind: ObjectKind,
    /// Its path by the keystore.
    location: &'a str,
}

impl Lost {
    fn object(&self) -> Option<Object<'_>> {
        let (id, kind) = self.object?;
        let location = &self.location;
        Some(Object { id, kind, location })
    }
}

impl Doomed {
    /// The VM that is meant by `asked`, a name or a UUID, with its envelopes and files.
    ///
    /// # Errors
    /// While it runs, and when nobody knows it.
    pub(crate) fn find(host: &Host<'_>, asked: &str) -> Result<Self, Problem> {
        let (vm, name, presence) = match names::find_domain(host.libvirt, asked) {
            Ok(defined) if defined.active => {
                return Err(Problem::busy(format!("{} is running", defined.name))
                    .next(Advice::ShutDownVm(defined.name.clone())));
            }
            Ok(defined) => {
                refuse_state_elsewhere(&defined, &host.swtpm_dir)?;
                (defined.vm, defined.name, Presence::Defined)
            }
            Err(absent) if absent.code == Code::NotFound => {
                let known = names::find_undefined(host.keystore, asked, Advice::ShredVm)?;
                let (vm, name) = known.ok_or(absent)?;
                (vm, name, Presence::NotDefined)
            }
            Err(problem) => return Err(problem),
        };
        let mut files: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        let own = host.kept.iter().filter(|kept| kept.vm == vm);
        for domain in own.filter_map(|kept| Domain::parse(&kept.xml).ok()) {
            for (id, path) in encrypted_layers(&domain) {
                files.entry(id).or_default().insert(path);
            }
        }
        let rows = host.keystore.envelopes_of(vm)?;
        let (mut records, mut lost) = (rows.sound, Vec::new());
        // A receipt has the same order each time.
        records.sort_by_key(|record| (record.envelope.kind.as_str(), record.location.clone()));
        for row in rows.damaged {
            let text = |column: &str| row.raw[column].as_str().unwrap_or_default().to_owned();
            match (row.envelope, row.holds) {
                (_, Some(held)) if held.envelope.vm != vm => {
                    let owner = held.envelope.vm.to_string();
                    let what = format!(
                        "{name} stays: the keystore's record {} holds a key of VM {owner}",
                        row.row
                    );
                    return Err(Problem::would_lose_key(what).next(
                        Advice::AdoptVm(owner)
                            .note("which mends that")
                            .or(Advice::RestoreState),
                    ));
                }
                (_, Some(held)) => records.push(EnvelopeRecord {
                    envelope: held.envelope,
                    state: EnvelopeState::Active,
                    location: held.location,
                    created: 0,
                    updated: 0,
                }),
                (id, None) => lost.push(Lost {
                    object: id.zip(serde_json::from_value(row.raw["kind"].clone()).ok()),
                    location: text("location"),
                    row: row.row,
                }),
            }
        }
        Ok(Self {
            vm,
            name,
            presence,
            records,
            lost,
            files,
        })
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = EnvelopeId> {
        let known = self.records.iter().map(|record| record.envelope.id);
        known.chain(self.lost.iter().filter_map(|lost| Some(lost.object?.0)))
    }

    /// What its envelopes are of, as far as the keystore tells.
    fn objects(&self) -> impl Iterator<Item = Object<'_>> + Clone {
        let known = self.records.iter().map(|record| Object {
            id: record.envelope.id,
            kind: record.envelope.kind,
            location: &record.location,
        });
        known.chain(self.lost.iter().filter_map(Lost::object))
    }

    /// Where the object of an envelope may be that is at `location` by the keystore.
    fn files_of(&self, id: EnvelopeId, location: &str) -> BTreeSet<PathBuf> {
        let mut files = self.files.get(&id).cloned().unwrap_or_default();
        if !location.is_empty() {
            files.insert(PathBuf::from(location));
        }
        files
    }

    /// Another host may have the file open, and the VM may be there.
    fn leaves_alone(&self, file: &Path, consent: Consent) -> bool {
        self.presence == Presence::NotDefined && consent == Consent::NotGiven && is_shared(file)
    }

    /// Which KEKs it needs, and which others do.
    fn needs(&self, host: &Host<'_>) -> Result<Needs, Problem> {
        let ids: BTreeSet<_> = self.ids().collect();
        let (known, damaged) = host.keystore.envelopes()?.claims();
        let (behind, retired) = (host.host_store.needed_keks()?, host.keystore.retired_keks()?);
        let saved = host.host_store.saved_states()?.damaged;
        let damaged = [damaged, behind.damaged, retired.damaged, saved]
            .into_iter()
            .flatten();
        let mut facts = Facts {
            known,
            silent: damaged.filter(|row| row.vm != Some(self.vm)).count(),
            behind: behind.sound,
            retired: retired.sound,
            elsewhere: Vec::new(),
        };
        // Each is asked who wrote it, which may take a provider: first the VM's own, which may name more, then what names one of its KEKs.
        let (own, others): (Vec<_>, Vec<_>) = elsewhere(host, self)?
            .into_iter()
            .partition(|envelope| ids.contains(&envelope.id));
        let weighed = own.into_iter().map(|copy| self.weigh(host, copy));
        facts.elsewhere = weighed.collect::<Result<_, _>>()?;
        let candidates = facts.needs(self.vm, &ids).own;
        let named = |copy: &Envelope| {
            let mut keks = copy
                .stanzas
                .iter()
                .map(|stanza| (stanza.provider, stanza.kek.0.clone()));
            keks.any(|kek: Kek| candidates.contains(&kek))
        };
        let others = others.into_iter().filter(named);
        for copy in others {
            facts.elsewhere.push(self.weigh(host, copy)?);
        }
        Ok(facts.needs(self.vm, &ids))
    }

    /// By the key of the keystore's version; by its own where there is none, which shows at least that it opens.
    fn weigh(&self, host: &Host<'_>, copy: Envelope) -> Result<(Envelope, Proof), StoreError> {
        let known = host.keystore.readable_envelope(copy.id)?;
        let proof = match &known {
            Some(known) if known.envelope == copy => Proof::Authentic,
            Some(known) => proof_of(host, &copy, &known.envelope),
            None => match host.recipients.open_envelope(&copy) {
                Ok(dek) if copy.format() == Envelope::FORMAT && copy.verify(&dek).is_err() => Proof::Forged,
                Err(error) if error.is_of_stanzas() => Proof::Forged,
                // What does not open here and now may open elsewhere.
                Ok(_) | Err(_) => Proof::Unknown,
            },
        };
        Ok((copy, proof))
    }

    fn kek_fate(&self, host: &Host<'_>, kek: &Kek, needs: &Needs, consent: Consent) -> KekFate {
        let provider = host.recipients.by_id(kek.0);
        KekFate::of(KekFacts {
            others_need_it: needs.others.contains(kek),
            sight: needs.sight,
            provider_is_here: provider.is_some(),
            is_kept_by_provider: provider.is_none_or(|provider| provider.keeps_keks()),
            presence: self.presence,
            consent,
        })
    }
}

/// What a shredding of the VM asks a word for.
pub(crate) fn preview(host: &Host<'_>, asked: &str) -> Result<ShredPreview, Problem> {
    let doomed = Doomed::find(host, asked)?;
    let needs = doomed.needs(host)?;
    let mut kept = Vec::new();
    for kek in &needs.own {
        if doomed.kek_fate(host, kek, &needs, Consent::NotGiven) == KekFate::Stays(KekFate::ELSEWHERE) {
            kept.push(format!(
                "KEK {} of provider '{}'",
                kek.1,
                host.recipients.name_of(kek.0)
            ));
        }
    }
    for record in &doomed.records {
        let files = doomed.files_of(record.envelope.id, &record.location).into_iter();
        kept.extend(
            files
                .filter(|file| doomed.leaves_alone(file, Consent::NotGiven))
                .map(|file| format!("the {} {}", record.envelope.kind, file.display())),
        );
    }
    Ok(ShredPreview {
        vm: doomed.vm.to_string(),
        name: doomed.name,
        kept_for_others: kept,
    })
}

/// What there is beside the keystore's records: in XML and images, in the files of what was forgotten, and in saved states. What can't
/// be read says nothing, and stops nothing.
fn elsewhere(host: &Host<'_>, doomed: &Doomed) -> Result<Vec<Envelope>, Problem> {
    let mut found: Vec<_> = Visible::of_host(host)?
        .copies
        .into_iter()
        .map(|copy| copy.envelope)
        .collect();
    let failed = |error: &ForgottenError| Problem::failed(chain(error)).of(format!("{} stays", doomed.name));
    for (path, kept) in forgotten::kept(host.host_store.dir()).map_err(|error| failed(&error))? {
        match kept {
            Ok(kept) => {
                found.extend(kept.objects.into_iter().map(|record| record.envelope));
                found.extend(kept.saved.into_iter().flat_map(|saved| saved.envelopes));
            }
            Err(error) => tracing::warn!(path = %path.display(), "{}", chain(&error)),
        }
    }
    let saved = host.host_store.saved_states()?.sound;
    found.extend(saved.into_iter().flat_map(|saved| saved.envelopes));
    Ok(found)
}

/// What is there would go on to be readable, and the receipt would not say so. XML that can't be read is shredded all the same.
fn refuse_state_elsewhere(defined: &DefinedDomain, swtpm_dir: &Path) -> Result<(), Problem> {
    let Ok(domain) = Domain::parse(&defined.xml) else {
        return Ok(());
    };
    object::refuse_elsewhere(&domain, swtpm_dir)
        .map_err(|failure| failure.of(format!("{} stays", defined.name)))
}

/// Whether other hosts may have the file open where no lock of theirs is seen here.
fn is_shared(path: &Path) -> bool {
    /// `f_type` of NFS, SMB (both), Ceph, GFS2, OCFS2, FUSE (GlusterFS for one), 9p and AFS: statfs(2).
    const SHARED: [i64; 9] = [
        0x6969,
        0xfe53_4d42,
        0xff53_4d42,
        0x00c3_6400,
        0x0116_1970,
        0x7461_636f,
        0x6573_5546,
        0x0102_1997,
        0x5346_414f,
    ];
    let is_device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    let on_network = nix::sys::statfs::statfs(path)
        .is_ok_and(|found| SHARED.contains(&(found.filesystem_type().0 & 0xffff_ffff)));
    is_device || on_network
}

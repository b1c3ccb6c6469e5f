//! What scripts get with `--json`: one document on standard output, whatever happens. docs/reference/json.md says what of it can be
//! relied on, and docs/reference/json-schema.json is made of the types that are named here.

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::Serialize;

use super::out;
use crate::api::{
    AuditVerified, CertificateView, FindingView, HostStatus, JobView, Jobs, LossPreview, Orphans, Outcome,
    ProblemView, ProviderView, Providers, Receipt, SettingsSet, SubjectView, TpmView, Vms, VolumeChecked,
};
use crate::model::problem::Problem;
use crate::object::disk::VolumeInfo;

/// Rises with what a script may stumble over. A new member, a new word of a set and a new document leave it as it is.
const VERSION: u32 = 1;

/// Why a command has not done what it was asked for.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Refusal {
    /// The version of this schema.
    #[cfg_attr(test, schemars(extend("const" = VERSION)))]
    schema: u32,
    error: ProblemView,
}

/// What a command tells.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Told<T> {
    /// The version of this schema.
    #[cfg_attr(test, schemars(extend("const" = VERSION)))]
    schema: u32,
    /// Why the command ends with another exit code than 0, where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ProblemView>,
    #[serde(flatten)]
    answer: T,
}

macro_rules! answers {
    ($($(#[$doc:meta])* $name:ident($of:ty): [$($command:literal),*],)*) => {
        /// What commands tell, beside why they were refused.
        #[derive(Debug, Serialize)]
        #[serde(untagged)]
        pub(super) enum Answer {
            $($(#[$doc])* $name($of),)*
        }

        /// The name of each document, the commands that print it, and what is in it.
        #[cfg(test)]
        fn documents(
            generator: &mut schemars::SchemaGenerator,
        ) -> Vec<(&'static str, &'static [&'static str], schemars::Schema)> {
            use schemars::JsonSchema;
            vec![$((stringify!($name), &[$($command),*] as &[_], <Told<$of>>::json_schema(generator))),*]
        }
    };
}

answers! {
    Status(Box<HostStatus>): ["status"],
    Jobs(Jobs): ["jobs", "jobs list"],
    Job(JobShown): ["jobs watch"],
    JobChanged(JobChanged): [
        "jobs abort", "jobs resume", "provider rotate", "provider rekey", "provider move", "provider recipients add",
        "provider recipients remove", "vm rekey"
    ],
    Providers(Providers): ["provider list"],
    Provider(Box<ProviderShown>): ["provider show"],
    ProviderChanged(Box<ProviderChanged>): [
        "provider add native", "provider add transit", "provider add pkcs11", "provider add kmip", "provider restore",
        "provider trust", "provider cache"
    ],
    SettingsSet(Box<SettingsSet>): ["provider set"],
    IdentitySet(Box<IdentityChanged>): ["provider identity"],
    TpmEnrolled(TpmChanged): ["provider tpm"],
    SigningRequest(SigningRequest): ["provider csr"],
    Done(Done): [
        "provider default", "provider lock", "provider unlock", "provider tpm", "provider backup", "state backup"
    ],
    StateRestored(StateRestored): ["state restore"],
    Orphans(Orphans): ["provider orphans"],
    Outcome(Outcome): [
        "provider delete", "volume share", "volume forget", "volume adopt", "volume resize", "vm seal", "vm unseal", "vm forget",
        "vm adopt", "vm autostart", "vm snapshot commit", "vm snapshot delete", "vm nvram reset"
    ],
    Preview(Preview): ["vm snapshot commit", "vm snapshot delete", "vm nvram reset"],
    VolumeCreated(VolumeMade): ["volume create"],
    VolumeChecked(VolumeChecked): ["volume check"],
    VolumeInfo(Box<VolumeInfo>): ["volume info"],
    Vms(Vms): ["vm status"],
    Shredded(Shredded): ["vm shred"],
    AuditVerified(AuditVerified): ["audit verify"],
}

/// What a command came to that has no more to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub(super) enum Deed {
    /// New keys go to the provider.
    ProviderIsDefault,
    /// The provider is locked, and its keys are out of memory.
    ProviderLocked,
    ProviderUnlocked,
    /// The TPM does not unlock the provider.
    TpmRemoved,
    /// The provider's keys are in the file `path`.
    ProviderBackedUp,
    /// All that virtseal keeps is in the file `path`.
    StateBackedUp,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Done {
    /// Whether it was not so before.
    pub(super) changed: bool,
    /// What holds now.
    pub(super) done: Deed,
    /// What that is true of.
    pub(super) object: SubjectView,
    /// The file that was written.
    pub(super) path: Option<PathBuf>,
    /// The same in words.
    pub(super) text: String,
    /// What to mind.
    pub(super) warnings: Vec<FindingView>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct JobShown {
    pub(super) job: JobView,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct JobChanged {
    /// As it is now; with `--watch`, as it has ended.
    pub(super) job: JobView,
    /// Whether the command has started or stopped it.
    pub(super) changed: bool,
    /// What to mind.
    pub(super) warnings: Vec<FindingView>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct ProviderShown {
    pub(super) provider: ProviderView,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct ProviderChanged {
    /// As it is now.
    pub(super) provider: ProviderView,
    /// Whether it was otherwise before, or was not there.
    pub(super) changed: bool,
    /// What to mind.
    pub(super) warnings: Vec<FindingView>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct IdentityChanged {
    /// The provider after it has asked its servers.
    pub(super) provider: ProviderView,
    /// What this host presents from now on.
    pub(super) certificate: CertificateView,
    /// Always: a key takes the place of the one before.
    pub(super) changed: bool,
    /// The KEKs that the new identity does not get to open an envelope.
    pub(super) warnings: Vec<FindingView>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct TpmChanged {
    /// What the TPM asks for now.
    pub(super) tpm: TpmView,
    /// Always: the TPM has bound it anew.
    pub(super) changed: bool,
    /// Why that is worth less than it seems.
    pub(super) warnings: Vec<FindingView>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct SigningRequest {
    /// PKCS #10, in PEM.
    pub(super) pem: String,
    /// The file that it was written to.
    pub(super) path: Option<PathBuf>,
    /// Whether the request is new, or a file was written.
    pub(super) changed: bool,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct StateRestored {
    /// The state directory.
    pub(super) path: PathBuf,
    /// The host that the backup is of.
    pub(super) host: String,
    /// When it was made.
    #[cfg_attr(test, schemars(extend("format" = "date-time", "pattern" = "Z$")))]
    pub(super) made: String,
    /// How many files were restored.
    pub(super) files: usize,
    /// Where that is now what was there.
    pub(super) before: Option<PathBuf>,
    pub(super) changed: bool,
}

/// What a command would do, and what would be lost by it.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Preview {
    /// Never: nothing was done.
    pub(super) changed: bool,
    #[serde(flatten)]
    pub(super) loss: LossPreview,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct VolumeMade {
    pub(super) path: String,
    /// The envelope's UUID.
    pub(super) envelope: String,
    /// The virtual size in bytes.
    pub(super) size: Option<u64>,
    /// The job that has filled it.
    pub(super) job: Option<i64>,
    pub(super) changed: bool,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Shredded {
    /// Whether anything was destroyed.
    pub(super) changed: bool,
    #[serde(flatten)]
    pub(super) receipt: Receipt,
}

impl Answer {
    /// Adds what was warned of on the way, where the document has a place for it.
    fn warn(&mut self, warned: Vec<FindingView>) {
        let warnings = match self {
            Self::JobChanged(told) => &mut told.warnings,
            Self::ProviderChanged(told) => &mut told.warnings,
            Self::SettingsSet(told) => &mut told.warnings,
            Self::IdentitySet(told) => &mut told.warnings,
            Self::TpmEnrolled(told) => &mut told.warnings,
            Self::Done(told) => &mut told.warnings,
            Self::Outcome(told) => &mut told.warnings,
            _ => return,
        };
        for warning in warned {
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
    }
}

/// Prints the only document of a command.
pub(super) fn print(
    answer: Option<Answer>,
    warned: Vec<FindingView>,
    problem: Option<&Problem>,
) -> Result<(), Problem> {
    let error = problem.map(ProblemView::from);
    match (answer, error) {
        (Some(mut answer), error) => {
            answer.warn(warned);
            out::json(&Told {
                schema: VERSION,
                error,
                answer,
            })
        }
        (None, Some(error)) => out::json(&Refusal {
            schema: VERSION,
            error,
        }),
        // It has printed line by line.
        (None, None) => Ok(()),
    }
}

//! What a TPM is to ask for before it unlocks a provider, of whatever kind: what is asked for, what was so before, and what it is worth.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use crate::api::{FindingView, TpmEnrolled, TpmRequest, TpmView};
use crate::host::local_time::rfc3339;
use crate::host::secure_boot::SecureBoot;
use crate::host::tpm::{BindPolicy, PcrList, SigningKey};
use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Problem, chain};
use crate::provider::toolbox::bound_credential::TpmEnrollment;

/// What is said of a new one.
pub(super) fn said(name: &str, enrollment: &TpmEnrollment) -> TpmEnrolled {
    let found = warnings(name, enrollment, &SecureBoot::of_host(Path::new("/")));
    TpmEnrolled {
        warnings: FindingView::all(&found),
        tpm: view(enrollment),
    }
}

pub(super) fn view(enrollment: &TpmEnrollment) -> TpmView {
    let since = Duration::from_secs(enrollment.enrolled.max(0).unsigned_abs());
    TpmView {
        pcrs: enrollment.pcrs.as_ref().map(PcrList::to_string),
        signed_by: enrollment.signed_by.as_ref().map(SigningKey::fingerprint),
        pin: enrollment.needs_pin,
        since: rfc3339(UNIX_EPOCH + since),
        stale: enrollment.stale,
    }
}

/// Why an enrolment is worth less than it seems.
fn warnings(name: &str, enrollment: &TpmEnrollment, secure_boot: &SecureBoot) -> Vec<Finding> {
    let Some(pcrs) = &enrollment.pcrs else {
        return Vec::new();
    };
    let mut warnings = warnings_of_pcrs(
        name,
        pcrs,
        enrollment.unmeasured.as_ref(),
        secure_boot,
        "the passphrase and another enrolment are needed",
    );
    if !warnings.is_empty() && !enrollment.needs_pin {
        let what = "--pin makes the TPM ask for a PIN too, whatever has booted";
        let provider = Subject::Provider(name.to_owned());
        warnings.push(Finding::warning(FindingCode::PinMissing, provider, what));
    }
    warnings
}

/// The same of anything that is bound to `pcrs`; `after_update` is what a changed one costs.
pub(crate) fn warnings_of_pcrs(
    name: &str,
    pcrs: &PcrList,
    unmeasured: Option<&PcrList>,
    secure_boot: &SecureBoot,
    after_update: &str,
) -> Vec<Finding> {
    let mut found = Vec::new();
    if pcrs.has_secure_boot() {
        found.extend(secure_boot.doubt());
    }
    if let Some(unmeasured) = unmeasured {
        let what = format!(
            "nothing has been measured into PCR {unmeasured} since this host booted: it is the same whatever boots"
        );
        found.push((FindingCode::PcrUnmeasured, what));
    }
    if let Some(changing) = pcrs.changed_by_updates() {
        let what = format!(
            "PCR {changing} changes with updates of the boot loader, the kernel or the initrd: each time {after_update}"
        );
        found.push((FindingCode::PcrUnsteady, what));
    }
    let found = found.into_iter();
    found
        .map(|(code, what)| Finding::warning(code, Subject::Provider(name.to_owned()), what))
        .collect()
}

/// What `request` asks for but for the PIN; what it does not say is as in the enrolment `before`.
pub(super) fn policy(
    name: &str,
    before: Option<&TpmEnrollment>,
    request: &TpmRequest,
) -> Result<BindPolicy, Problem> {
    let usage = |error: &dyn std::error::Error| Problem::usage(chain(error)).next(enroll_again(name, before));
    let pcrs = match &request.pcrs {
        Some(given) => given.parse::<PcrList>().map_err(|error| usage(&error))?,
        None => pcrs_of_before(name, before)?,
    };
    let key = match &request.public_key {
        Some(pem) => Some(SigningKey::from_pem(pem.as_bytes()).map_err(|error| usage(&error))?),
        None if pcrs.has_kernel() => before.and_then(|before| before.signed_by.clone()),
        None => None,
    };
    BindPolicy::new(pcrs, key).map_err(|error| {
        Problem::usage(format!("provider '{name}' is not enrolled: {error}")).next(
            Advice::EnrollTpm {
                name: name.to_owned(),
                options: "--pcrs 7,11 --pcr-public-key FILE".into(),
            }
            .or("--pcrs 7"),
        )
    })
}

/// A PIN is taken away only by who says so.
pub(super) fn refuse_to_drop_pin(
    name: &str,
    before: Option<&TpmEnrollment>,
    request: &TpmRequest,
    has_pin: bool,
) -> Result<(), Problem> {
    // A damaged one does not tell.
    let had_pin = before.is_some_and(|before| before.needs_pin || before.pcrs.is_none());
    if !had_pin || has_pin || request.without_pin {
        return Ok(());
    }
    Err(Problem::usage(format!(
        "provider '{name}' may be enrolled with a PIN, and this would take it away"
    ))
    .next(enroll_again(name, before).note("with --pin or --no-pin")))
}

/// The PCRs that the TPM looks at now, or the usual ones when it looks at none.
fn pcrs_of_before(name: &str, before: Option<&TpmEnrollment>) -> Result<PcrList, Problem> {
    let Some(before) = before else {
        return Ok(PcrList::default());
    };
    before.pcrs.clone().ok_or_else(|| {
        Problem::usage(format!(
            "provider '{name}': its enrolment is damaged, and does not say which PCRs it was for"
        ))
        .next(Advice::EnrollTpm {
            name: name.to_owned(),
            options: "--pcrs LIST".into(),
        })
    })
}

/// The command that enrolls it for the PCRs that it is enrolled for.
pub(super) fn enroll_again(name: &str, before: Option<&TpmEnrollment>) -> Advice {
    let with = |options: String| Advice::EnrollTpm {
        name: name.to_owned(),
        options: options.into(),
    };
    match before.map(|before| before.pcrs.as_ref().zip(Some(&before.signed_by))) {
        Some(None) => with("--pcrs LIST".into()),
        Some(Some((pcrs, None))) if pcrs.has_kernel() => {
            with(format!("--pcrs {pcrs} --pcr-public-key FILE")).or("--pcrs 7")
        }
        Some(Some((pcrs, _))) if *pcrs != PcrList::default() => with(format!("--pcrs {pcrs}")),
        Some(Some(_)) | None => with(String::new()),
    }
}

//! The settings of a provider, as they are shown.
//!
//! Most are of the kind, in one table each. A few are of this host: whether it is the default one and a recipient, what its TPM opens.

use super::tpm;
use crate::api::SettingView;
use crate::daemon::Daemon;
use crate::model::advice::Advice;
use crate::provider::kind::Kind;
use crate::provider::setting::Changes;
use crate::recipients::Provider;
use crate::store::ProviderRecord;

/// What is not a setting of the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OfHost {
    Default,
    Recipient,
    Tpm,
    Persist,
}

impl OfHost {
    const ALL: [Self; 4] = [Self::Default, Self::Recipient, Self::Tpm, Self::Persist];

    pub(super) fn named(key: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|setting| setting.key() == key)
    }

    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Recipient => "recipient",
            Self::Tpm => "tpm",
            Self::Persist => "persist",
        }
    }

    /// What changes it; none for what `provider set` changes.
    pub(super) fn changed_by(self, known: &Provider) -> Option<Advice> {
        let name = || known.provider().name().to_owned();
        match self {
            Self::Default | Self::Tpm | Self::Persist => None,
            Self::Recipient => Some(
                Advice::from("recipients in virtseald.yaml")
                    .then(Advice::ReloadDaemon)
                    .also(Advice::AddRecipient(name()).note("for what is sealed already")),
            ),
        }
    }
}

/// All settings of `known`, as an admin reads them.
pub(super) fn views(
    daemon: &Daemon,
    known: &Provider,
    record: Option<&ProviderRecord>,
    is_default: bool,
) -> Vec<SettingView> {
    let row = record.and_then(|record| Some((Kind::named(&record.kind)?, record)));
    let of_kind = row
        .into_iter()
        .flat_map(|(row, record)| row.settings.read(&record.settings));
    let mut views: Vec<_> = of_kind
        .map(|setting| SettingView {
            key: setting.key.name.to_owned(),
            value: setting.value,
            settable: !matches!(setting.key.changes, Changes::Never(_)),
            note: match setting.key.changes {
                Changes::Never(why) => Some(why.to_owned()),
                Changes::Freely | Changes::AfterTrial => None,
            },
        })
        .collect();
    let of_host = |setting: OfHost, value: Option<String>| {
        let changed_by = setting.changed_by(known);
        SettingView {
            key: setting.key().to_owned(),
            value,
            settable: changed_by.is_none(),
            note: changed_by.map(|advice| advice.to_string()),
        }
    };
    let yes_or_no = |is: bool| Some(if is { "yes" } else { "no" }.to_owned());
    let id = known.provider().id();
    let policy = daemon.recipients.policy().unwrap_or_default();
    let is_recipient = policy.iter().any(|recipient| recipient.provider().id() == id);
    views.push(of_host(OfHost::Default, yes_or_no(is_default)));
    views.push(of_host(OfHost::Recipient, yes_or_no(is_recipient)));
    let pcrs = tpm::enrollment(daemon, known).map(|enrollment| match enrollment.pcrs {
        Some(pcrs) => format!("PCR {pcrs}"),
        None => "damaged".to_owned(),
    });
    views.push(of_host(OfHost::Tpm, pcrs));
    if let Some(cache) = known.cache() {
        let kept = cache.persistence().map(|kept| kept.keep.to_string());
        views.push(of_host(OfHost::Persist, kept));
    }
    views
}

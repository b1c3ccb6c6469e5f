//! What the settings name and this host does not have: nobody would notice before a seal, or a reader, is refused.

use crate::config::Config;
use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};

/// Whether this host has the group of the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReaderGroup {
    /// Its members may connect.
    Exists,
    /// Root alone may.
    Missing,
}

/// What is found on a host with the providers that `is_provider` knows.
pub(crate) fn warnings(
    config: &Config,
    is_provider: impl Fn(&str) -> bool,
    group: ReaderGroup,
) -> Vec<Finding> {
    let unknown = config.recipients.iter().filter(|name| !is_provider(name));
    let mut warnings: Vec<_> = unknown
        .map(|name| {
            let what = format!(
                "recipients in virtseald.yaml names '{name}', and there is no such key provider on this host: \
                 nothing new is sealed until there is"
            );
            Finding::warning(FindingCode::RecipientMissing, Subject::Host, what).next(Advice::ListProviders)
        })
        .collect();
    if group == ReaderGroup::Missing {
        let group = &config.socket_group;
        let what = format!(
            "socket_group in virtseald.yaml is '{group}', and there is no such group on this host: only root may connect"
        );
        warnings.push(
            Finding::warning(FindingCode::GroupMissing, Subject::Host, what)
                .next(Advice::from(format!("groupadd --system {group}")).then(Advice::RestartDaemon)),
        );
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_does_not_have_is_named() {
        let config = Config {
            recipients: vec!["main".into(), "nosuch".into()],
            socket_group: "no-such-group".into(),
            ..Config::default()
        };
        let has = |name: &str| name == "main";
        let warned = warnings(&config, has, ReaderGroup::Exists);
        assert!(
            matches!(&warned[..], [one] if one.what.contains("'nosuch'")),
            "{warned:?}"
        );
        let warned = warnings(&config, |_| true, ReaderGroup::Missing);
        assert!(
            matches!(&warned[..], [one] if one.what.contains("'no-such-group'")),
            "{warned:?}"
        );
    }
}

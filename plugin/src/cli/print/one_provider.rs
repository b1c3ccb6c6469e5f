//! What `virtseal provider show` prints for people.

use std::fmt::Display;

use crate::api::{PersistView, ProviderView};
use crate::host::local_time::{parse_rfc3339, time_of_day};

/// The column of what is said of each thing.
pub(super) const STATE: usize = 15;

/// All there is to say of it, a line each.
pub(super) fn lines(provider: &ProviderView) -> Vec<String> {
    let mut lines = vec![provider_name(provider)];
    let mut say = |what: &str, said: &str| lines.push(format!("  {what:<13}{said}"));
    let setting = |key: &str| {
        let found = provider.settings.iter().find(|setting| setting.key == key);
        found.and_then(|setting| setting.value.as_deref())
    };
    if let Some(description) = setting("description") {
        say("description", description);
    }
    say("kind", &provider.kind.to_string());
    say("id", &provider.id);
    say("state", &because(&provider.state, provider.reason.as_deref()));
    say("since", &local(Some(&provider.since)));
    say("last answer", &local(provider.last_answer.as_deref()));
    say("envelopes", &provider.envelopes.to_string());
    if !provider.unlocked_by.is_empty() {
        say("unlocked by", &provider.unlocked_by.join("; "));
    }
    for detail in &provider.details {
        say(&detail.what, &detail.said);
    }
    if let Some(cache) = &provider.cache {
        say("cache", &format!("{cache}, {} keys in it", provider.cached_keks));
    }
    if let Some(persist) = &provider.persist {
        say("persist", &persistence(persist));
    }
    lines.push("  settings".to_owned());
    for setting in &provider.settings {
        let value = setting.value.as_deref().unwrap_or("-");
        let note = match &setting.note {
            Some(note) => format!("  ({note})"),
            None => String::new(),
        };
        lines.push(format!("    {:<14}{value}{note}", setting.key));
    }
    lines
}

/// `24h, 4 keys on disk, by the TPM (PCR 7, since 14:02)`.
fn persistence(persist: &PersistView) -> String {
    let pcrs = persist
        .pcrs
        .as_ref()
        .map_or("damaged".to_owned(), |pcrs| format!("PCR {pcrs}"));
    format!(
        "{}, {} keys on disk, by the TPM ({pcrs}, since {})",
        persist.keep,
        persist.keks,
        local(Some(&persist.since))
    )
}

pub(super) fn provider_name(provider: &ProviderView) -> String {
    let default = if provider.is_default { " (default)" } else { "" };
    format!("{}{default}", provider.name)
}

pub(super) fn because(state: &impl Display, reason: Option<&str>) -> String {
    reason.map_or_else(|| state.to_string(), |reason| format!("{state} ({reason})"))
}

/// A time from the daemon, as a person here would write it.
pub(super) fn local(time: Option<&str>) -> String {
    time.and_then(parse_rfc3339)
        .map_or_else(|| "-".to_owned(), time_of_day)
}

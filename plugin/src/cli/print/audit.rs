//! The audit log.

use std::collections::BTreeMap;

use super::super::document::Answer;
use super::super::out::{line, table, write};
use super::Printer;
use crate::api::AuditVerified;
use crate::model::problem::Problem;
use crate::terminal::visible_json;

impl Printer {
    pub(in crate::cli) fn audit(&self, lines: &[String]) -> Result<(), Problem> {
        if self.json {
            return lines.iter().try_for_each(|record| write(&visible_json(record)));
        }
        let rows = lines.iter().map(|record| audit_row(record));
        table(&["TIME", "UID", "OPERATION", "OUTCOME", "OF", "DETAIL"], rows)
    }

    pub(in crate::cli) fn audit_verified(&self, verified: AuditVerified) -> Result<(), Problem> {
        if self.json {
            return self.tell(Answer::AuditVerified(verified));
        }
        line(&format!(
            "{} records, the chain is whole, head {}",
            verified.records, verified.head
        ))
    }
}

/// A record for people. A line that is no record is shown as it is: `audit verify` says what is wrong with it.
fn audit_row(record: &str) -> Vec<String> {
    let Ok(fields) = serde_json::from_str::<BTreeMap<String, serde_json::Value>>(record) else {
        return vec![record.to_owned()];
    };
    let text = |name: &str| match fields.get(name) {
        None => String::new(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let subject = ["provider", "vm_name", "object"].map(text);
    let subject: Vec<_> = subject.into_iter().filter(|name| !name.is_empty()).collect();
    // Times are kept to the nanosecond.
    let time = text("time");
    let seconds = time
        .split_once('.')
        .map_or(time.clone(), |(seconds, _)| format!("{seconds}Z"));
    vec![
        seconds,
        text("actor"),
        text("op"),
        text("outcome"),
        subject.join(" "),
        text("detail"),
    ]
}

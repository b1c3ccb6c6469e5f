//! What more than one kind of provider is built with.

pub(super) mod address;
pub(super) mod certificate;
mod certificate_request;
pub(crate) mod deadline;
pub(super) mod gcm;
pub(super) mod identity;
pub(super) mod kek_name;
pub(super) mod locks;
pub(super) mod revocation;
pub(super) mod timed;
pub(super) mod tls;
pub(super) mod tpm_key;

/// What a server says, on one line of bounded length and without anything that a terminal would act on.
pub(super) fn printable(text: &str) -> String {
    text.trim()
        .chars()
        .take(300)
        .map(|c| if c.is_control() || turns_text(c) { ' ' } else { c })
        .collect()
}

/// Unicode's marks, embeddings, overrides and isolates of direction: with them a terminal shows another text.
fn turns_text(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

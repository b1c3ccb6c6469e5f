//! The bounds that XML must keep before the parser may see it.
//!
//! The parser compares each attribute of a tag with all before it, and copies the namespaces in scope for each element that
//! declares one: without bounds a few hundred kilobytes cost it minutes. libvirt writes nothing that comes near any of these.
//! The hook and `virtseald` must agree on them: what one of them reads, the other does.

use std::fmt;

/// The most attributes of a tag.
pub const MAX_ATTRIBUTES: usize = 256;
/// The most bytes of a tag, from `<` to `>`.
pub const MAX_TAG: usize = 64 * 1024;
/// The most elements in one another; libxml2 allows no more.
pub const MAX_DEPTH: usize = 256;
/// The most declarations of namespaces in a document.
pub const MAX_NAMESPACES: usize = 512;

/// Which bound XML does not keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beyond {
    /// [`MAX_ATTRIBUTES`].
    Attributes,
    /// [`MAX_TAG`].
    Tag,
    /// [`MAX_DEPTH`].
    Depth,
    /// [`MAX_NAMESPACES`].
    Namespaces,
    /// It has a document type, and so may have entities.
    Dtd,
}

impl fmt::Display for Beyond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attributes => write!(f, "a tag has more than {MAX_ATTRIBUTES} attributes"),
            Self::Tag => write!(f, "a tag has more than {MAX_TAG} bytes"),
            Self::Depth => write!(f, "more than {MAX_DEPTH} elements are in one another"),
            Self::Namespaces => write!(f, "it declares more than {MAX_NAMESPACES} namespaces"),
            Self::Dtd => write!(f, "it has a document type"),
        }
    }
}

impl std::error::Error for Beyond {}

/// Checks the bounds in one pass, without judging whether the XML is well-formed: what the parser would refuse may pass,
/// and what the parser accepts is never counted lower than it counts.
///
/// # Errors
/// The first bound that it does not keep.
pub fn bounded(xml: &[u8]) -> Result<(), Beyond> {
    let (mut depth, mut namespaces) = (0_usize, 0);
    let mut rest = xml;
    while let Some(start) = rest.iter().position(|byte| *byte == b'<') {
        let markup = &rest[start..];
        let length = if markup.starts_with(b"<!--") {
            through(markup, 4, b"-->")
        } else if markup.starts_with(b"<![CDATA[") {
            through(markup, 9, b"]]>")
        } else if markup.starts_with(b"<?") {
            through(markup, 2, b"?>")
        } else if markup.starts_with(b"<!") {
            return Err(Beyond::Dtd);
        } else {
            let tag = Tag::read(markup)?;
            namespaces += tag.namespaces;
            if namespaces > MAX_NAMESPACES {
                return Err(Beyond::Namespaces);
            }
            match tag.kind {
                Kind::Open => depth += 1,
                Kind::Close => depth = depth.saturating_sub(1),
                Kind::Empty => {}
            }
            if depth > MAX_DEPTH {
                return Err(Beyond::Depth);
            }
            tag.length
        };
        rest = &markup[length..];
    }
    Ok(())
}

/// How many bytes there are up to and with `end`, which is looked for behind the first `from`.
fn through(markup: &[u8], from: usize, end: &[u8]) -> usize {
    let found = markup[from..].windows(end.len()).position(|window| window == end);
    found.map_or(markup.len(), |at| from + at + end.len())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Open,
    Close,
    Empty,
}

struct Tag {
    kind: Kind,
    length: usize,
    namespaces: usize,
}

impl Tag {
    /// The tag at the start of `markup`; it ends with the text if it has no end.
    fn read(markup: &[u8]) -> Result<Self, Beyond> {
        let (mut attributes, mut namespaces) = (0, 0);
        let (mut quote, mut length) = (None, markup.len());
        for (at, byte) in markup.iter().enumerate() {
            if at >= MAX_TAG {
                return Err(Beyond::Tag);
            }
            match (quote, byte) {
                (Some(open), byte) if open == byte => quote = None,
                (Some(_), _) => {}
                (None, b'"' | b'\'') => {
                    quote = Some(byte);
                    attributes += 1;
                }
                (None, b'x') if markup[at..].starts_with(b"xmlns") => namespaces += 1,
                (None, b'>') => {
                    length = at + 1;
                    break;
                }
                (None, _) => {}
            }
        }
        if attributes > MAX_ATTRIBUTES {
            return Err(Beyond::Attributes);
        }
        let kind = match &markup[..length] {
            [_, b'/', ..] => Kind::Close,
            [.., b'/', b'>'] => Kind::Empty,
            _ => Kind::Open,
        };
        Ok(Self {
            kind,
            length,
            namespaces,
        })
    }
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "what the parser makes of it is the question"
)]
mod tests {
    use proptest::prelude::*;
    use roxmltree::{Document, ParsingOptions};

    use super::*;

    fn attributes(count: usize) -> String {
        (0..count).map(|number| format!(" a{number}='>\"'")).collect()
    }

    fn nested(count: usize) -> String {
        "<a>".repeat(count) + &"</a>".repeat(count)
    }

    #[test]
    fn each_bound_is_kept_and_just_passed() {
        let declared = |count: usize| -> String {
            (0..count)
                .map(|number| format!("<a xmlns:p{number}='u'/>"))
                .collect()
        };
        let long = |length: usize| format!("<d a='{}'/>", "x".repeat(length - "<d a=''/>".len()));
        for (within, beyond, bound) in [
            (
                format!("<d{}/>", attributes(256)),
                format!("<d{}/>", attributes(257)),
                Beyond::Attributes,
            ),
            (long(MAX_TAG), long(MAX_TAG + 1), Beyond::Tag),
            (nested(256), nested(257), Beyond::Depth),
            (declared(512), declared(513), Beyond::Namespaces),
            (
                "<d/>".into(),
                "<!DOCTYPE d [<!ENTITY a 'b'>]><d/>".into(),
                Beyond::Dtd,
            ),
        ] {
            assert_eq!(bounded(within.as_bytes()), Ok(()));
            assert_eq!(bounded(beyond.as_bytes()), Err(bound));
        }
    }

    #[test]
    fn what_is_no_tag_does_not_count() {
        let many = "<a ".to_owned() + &"b='' ".repeat(400);
        for text in [
            format!("<d><!--{many}--></d>"),
            format!("<d><![CDATA[{many}]]></d>"),
            format!("<d><?p {many}?></d>"),
            format!("<d>{}</d>", "b='' ".repeat(400)),
        ] {
            assert_eq!(bounded(text.as_bytes()), Ok(()), "{text}");
        }
        // Nothing of these ends where it seems to.
        for opener in [
            "<!-->",
            "<!--->",
            "<![CDATA[>",
            "<?p >",
            "<?p ?x>",
            "<d a='>'>",
            "<d a=\"'>\">",
        ] {
            let text = format!("<d>{opener}{many}/></d>");
            let parsed = Document::parse(&text).is_ok();
            assert!(!parsed || bounded(text.as_bytes()).is_ok(), "{text}");
        }
    }

    const PIECES: [&str; 30] = [
        "<a>",
        "</a>",
        "<a ",
        "<b:c ",
        "/>",
        ">",
        "<",
        "'",
        "\"",
        "=",
        " x='",
        " y=\"",
        " z='' ",
        " xmlns:p='u' ",
        " xmlns='v'",
        "<!--",
        "-->",
        "--",
        "<![CDATA[",
        "]]>",
        "]",
        "<?pi ",
        "?>",
        "?",
        "&lt;",
        "&#60;",
        "text",
        "/",
        " ",
        "<!",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        /// Wherever too many attributes stand: what the parser accepts was counted no lower than it counts.
        #[test]
        fn the_parser_never_sees_more_than_was_counted(
            before in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..10),
            tag in prop::sample::select(vec!["<t ", "<!-- <t ", "'<t ", "<![CDATA[<t ", "<?t ", "<a/><t"]),
            after in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..6),
        ) {
            let text = format!("<a>{}{tag}{}{}/></a>", before.concat(), attributes(MAX_ATTRIBUTES + 1), after.concat());
            let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
            if let Ok(document) = Document::parse_with_options(&text, options) {
                let widest = document.descendants().map(|node| node.attributes().len()).max();
                prop_assert!(widest <= Some(MAX_ATTRIBUTES) || bounded(text.as_bytes()).is_err(), "{}", text);
            }
        }
    }
}

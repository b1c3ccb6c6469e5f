//! Changes to ranges of an XML text.
//!
//! The places come from a parsed document of that same text, so it is well-formed; what is inserted takes the
//! indentation and the line ends of its surroundings.

use std::ops::Range;

use roxmltree::Node;

/// Replaces the bytes of `at` by `with`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Edit {
    at: Range<usize>,
    with: String,
}

/// Applies edits, those at one place in their order; `None` if two overlap.
pub(super) fn apply(xml: &str, mut edits: Vec<Edit>) -> Option<String> {
    edits.sort_by_key(|edit| (edit.at.start, edit.at.end));
    let mut out = String::with_capacity(xml.len() + edits.iter().map(|edit| edit.with.len()).sum::<usize>());
    let mut done = 0;
    for edit in &edits {
        out.push_str(xml.get(done..edit.at.start)?);
        out.push_str(&edit.with);
        done = edit.at.end;
    }
    out.push_str(xml.get(done..)?);
    Some(out)
}

/// An element to insert. Its tag and text are written as they are, so their makers escape them.
#[derive(Debug)]
pub(super) struct Element {
    name: String,
    attributes: String,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Text(String),
    Children(Vec<Element>),
}

impl Element {
    pub(super) fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            attributes: String::new(),
            content: Content::Children(Vec::new()),
        }
    }

    pub(super) fn attribute(mut self, name: &str, value: &str) -> Self {
        self.attributes
            .push_str(&format!(" {name}='{}'", escape_attribute(value)));
        self
    }

    pub(super) fn text(mut self, text: &str) -> Self {
        self.content = Content::Text(escape_text(text));
        self
    }

    pub(super) fn children(mut self, children: impl IntoIterator<Item = Element>) -> Self {
        self.content = Content::Children(children.into_iter().collect());
        self
    }

    fn render(&self, layout: &Layout, depth: usize, out: &mut String) {
        let Self {
            name,
            attributes,
            content,
        } = self;
        match content {
            Content::Text(text) => out.push_str(&format!("<{name}{attributes}>{text}</{name}>")),
            Content::Children(children) if children.is_empty() => {
                out.push_str(&format!("<{name}{attributes}/>"));
            }
            Content::Children(children) => {
                out.push_str(&format!("<{name}{attributes}>"));
                for child in children {
                    layout.line(depth + 1, out);
                    child.render(layout, depth + 1, out);
                }
                layout.line(depth, out);
                out.push_str(&format!("</{name}>"));
            }
        }
    }
}

/// Where a new child goes.
#[derive(Clone, Copy)]
pub(super) enum Place<'a, 'i> {
    First,
    Last,
    After(Node<'a, 'i>),
}

/// Inserts `element` below `parent`.
pub(super) fn insert(xml: &str, parent: Node<'_, '_>, place: Place<'_, '_>, element: &Element) -> Edit {
    let tag = StartTag::of(xml, parent);
    let layout = match place {
        Place::After(sibling) => Layout::below(xml, parent, Some(sibling)),
        Place::First | Place::Last => Layout::below(xml, parent, None),
    };
    let mut with = String::new();
    layout.line(0, &mut with);
    element.render(&layout, 0, &mut with);
    if tag.self_closing {
        layout.closing_line(&mut with);
        let with = format!(">{with}</{}>", &xml[tag.name.clone()]);
        return Edit {
            at: tag.bare_end..tag.end,
            with,
        };
    }
    let content = tag.end..end_tag(xml, parent);
    let inside = &xml[content.clone()];
    let at = match place {
        Place::After(sibling) => sibling.range().end,
        Place::Last => content.start + inside.trim_end_matches(SPACE).len(),
        Place::First => content.start,
    };
    if inside.is_empty() {
        layout.closing_line(&mut with);
    }
    Edit { at: at..at, with }
}

/// Sets an attribute that has no namespace; nothing to do if it has that value.
pub(super) fn set_attribute(xml: &str, node: Node<'_, '_>, name: &str, value: &str) -> Option<Edit> {
    let tag = StartTag::of(xml, node);
    match node.attribute(name) {
        Some(found) if found == value => None,
        Some(_) => {
            let found = tag
                .attributes
                .iter()
                .find(|(found, _)| &xml[found.clone()] == name);
            found.map(|(_, at)| Edit {
                at: at.clone(),
                with: escape_attribute(value),
            })
        }
        None => {
            let last = tag
                .attributes
                .last()
                .map_or(tag.name.end, |(_, value)| value.end + 1);
            let with = format!(" {name}='{}'", escape_attribute(value));
            Some(Edit { at: last..last, with })
        }
    }
}

/// Puts another attribute in the place of one, both without a namespace; nothing to do if there is none.
pub(super) fn rename_attribute(
    xml: &str,
    node: Node<'_, '_>,
    from: &str,
    to: &str,
    value: &str,
) -> Option<Edit> {
    let tag = StartTag::of(xml, node);
    let mut attributes = tag.attributes.iter();
    let (found, old) = attributes.find(|(found, _)| &xml[found.clone()] == from)?;
    Some(Edit {
        at: found.start..old.end + 1,
        with: format!("{to}='{}'", escape_attribute(value)),
    })
}

/// Removes an attribute that has no namespace, with the space before it.
pub(super) fn remove_attribute(xml: &str, node: Node<'_, '_>, name: &str) -> Option<Edit> {
    let tag = StartTag::of(xml, node);
    let (found, value) = tag
        .attributes
        .iter()
        .find(|(found, _)| &xml[found.clone()] == name)?;
    let start = xml[..found.start].trim_end_matches(SPACE).len();
    Some(Edit {
        at: start..value.end + 1,
        with: String::new(),
    })
}

/// Replaces what is between the tags by text.
pub(super) fn set_text(xml: &str, node: Node<'_, '_>, text: &str) -> Edit {
    replace_content(xml, node, &escape_text(text))
}

/// Replaces what is between the tags by one element; comments stay, before it.
pub(super) fn set_child(xml: &str, node: Node<'_, '_>, element: &Element) -> Edit {
    let layout = Layout::below(xml, node, None);
    let mut with = String::new();
    for comment in node.children().filter(Node::is_comment) {
        layout.line(0, &mut with);
        with.push_str(&xml[comment.range()]);
    }
    layout.line(0, &mut with);
    element.render(&layout, 0, &mut with);
    layout.closing_line(&mut with);
    replace_content(xml, node, &with)
}

fn replace_content(xml: &str, node: Node<'_, '_>, content: &str) -> Edit {
    let tag = StartTag::of(xml, node);
    if tag.self_closing {
        let with = format!(">{content}</{}>", &xml[tag.name]);
        return Edit {
            at: tag.bare_end..tag.end,
            with,
        };
    }
    Edit {
        at: tag.end..end_tag(xml, node),
        with: content.to_owned(),
    }
}

/// Removes an element with the white space before it.
pub(super) fn remove(xml: &str, node: Node<'_, '_>) -> Edit {
    let start = xml[..node.range().start].trim_end_matches(SPACE).len();
    Edit {
        at: start..node.range().end,
        with: String::new(),
    }
}

/// Puts an element where another one was that it is in.
pub(super) fn put_in_place_of(xml: &str, outer: Node<'_, '_>, inner: Node<'_, '_>) -> Edit {
    Edit {
        at: outer.range(),
        with: xml[inner.range()].to_owned(),
    }
}

/// Removes an element; if nothing else is in its parent, that becomes `<parent/>`.
pub(super) fn remove_and_collapse(xml: &str, node: Node<'_, '_>) -> Edit {
    let Some(parent) = node.parent_element().filter(|parent| is_all_of(node, *parent)) else {
        return remove(xml, node);
    };
    let at = StartTag::of(xml, parent).bare_end..parent.range().end;
    Edit {
        at,
        with: "/>".into(),
    }
}

/// Whether there is nothing but `node` in `parent`.
pub(super) fn is_all_of(node: Node<'_, '_>, parent: Node<'_, '_>) -> bool {
    let blank = |other: Node<'_, '_>| other.is_text() && other.text().unwrap_or_default().trim().is_empty();
    parent.children().all(|other| other == node || blank(other))
}

/// The name of an element as the text has it, with its prefix.
pub(super) fn raw_name<'x>(xml: &'x str, node: Node<'_, '_>) -> &'x str {
    &xml[StartTag::of(xml, node).name]
}

const SPACE: [char; 4] = [' ', '\t', '\r', '\n'];

fn escape_text(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// For either kind of quotes.
fn escape_attribute(value: &str) -> String {
    escape_text(value).replace('\'', "&apos;").replace('"', "&quot;")
}

struct StartTag {
    name: Range<usize>,
    /// Name and value, that without its quotes.
    attributes: Vec<(Range<usize>, Range<usize>)>,
    self_closing: bool,
    /// Where `>` or `/>` starts, without the space before it.
    bare_end: usize,
    /// Behind `>`.
    end: usize,
}

impl StartTag {
    /// Reads the tag again: the parser keeps no place of a tag's end, and none of `xmlns`.
    fn of(xml: &str, node: Node<'_, '_>) -> Self {
        let bytes = xml.as_bytes();
        let stop = node.range().end;
        let name_start = node.range().start + 1;
        let name_end = until(bytes, name_start, stop, |b| {
            b.is_ascii_whitespace() || matches!(b, b'/' | b'>')
        });
        let mut attributes = Vec::new();
        let mut at = name_end;
        let mut bare_end = name_end;
        loop {
            at = until(bytes, at, stop, |b| !b.is_ascii_whitespace());
            if at >= stop || matches!(bytes[at], b'/' | b'>') {
                break;
            }
            let attribute = until(bytes, at, stop, |b| b.is_ascii_whitespace() || b == b'=');
            let open = until(bytes, attribute, stop, |b| matches!(b, b'\'' | b'"'));
            let quote = bytes.get(open).copied();
            let close = until(bytes, open + 1, stop, |b| Some(b) == quote);
            attributes.push((at..attribute, open + 1..close));
            at = close + 1;
            bare_end = at;
        }
        let self_closing = bytes.get(at) == Some(&b'/');
        Self {
            name: name_start..name_end,
            attributes,
            self_closing,
            bare_end,
            end: (at + 1 + usize::from(self_closing)).min(stop),
        }
    }
}

fn until(bytes: &[u8], from: usize, stop: usize, found: impl Fn(u8) -> bool) -> usize {
    let rest = bytes.get(from..stop).unwrap_or_default();
    rest.iter()
        .position(|byte| found(*byte))
        .map_or(stop, |at| from + at)
}

/// Where the `</…>` of an element that has one starts.
fn end_tag(xml: &str, node: Node<'_, '_>) -> usize {
    let range = node.range();
    xml[range.clone()]
        .rfind("</")
        .map_or(range.end, |at| range.start + at)
}

/// How children of an element are laid out.
struct Layout {
    /// `None` where everything stands on one line.
    lines: Option<Lines>,
}

struct Lines {
    newline: &'static str,
    parent: String,
    child: String,
    unit: String,
}

impl Layout {
    /// As `model`, one of the children, or else the last of them is.
    fn below(xml: &str, parent: Node<'_, '_>, model: Option<Node<'_, '_>>) -> Self {
        let own = indentation(xml, parent.range().start);
        let child = match model.or_else(|| parent.last_element_child()) {
            Some(child) => indentation(xml, child.range().start).map(str::to_owned),
            None => own.map(|own| format!("{own}{}", unit_of(own))),
        };
        let own = own.unwrap_or_default();
        let lines = child.map(|child| Lines {
            newline: if xml.contains("\r\n") { "\r\n" } else { "\n" },
            unit: match child.strip_prefix(own) {
                None | Some("") => unit_of(&child).to_owned(),
                Some(unit) => unit.to_owned(),
            },
            parent: own.to_owned(),
            child,
        });
        Self { lines }
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(lines) = &self.lines {
            out.push_str(lines.newline);
            out.push_str(&lines.child);
            out.push_str(&lines.unit.repeat(depth));
        }
    }

    fn closing_line(&self, out: &mut String) {
        if let Some(lines) = &self.lines {
            out.push_str(lines.newline);
            out.push_str(&lines.parent);
        }
    }
}

/// The white space between the start of the line and `at`, if there is nothing else.
fn indentation(xml: &str, at: usize) -> Option<&str> {
    let line = xml[..at].rfind('\n').map(|newline| newline + 1);
    let line = &xml[line.unwrap_or(0)..at];
    line.trim_matches([' ', '\t']).is_empty().then_some(line)
}

fn unit_of(indentation: &str) -> &'static str {
    if indentation.contains('\t') { "\t" } else { "  " }
}

#[cfg(test)]
mod tests {
    use super::super::xml::parse_document;
    use super::*;

    fn edited(xml: &str, edit: impl FnOnce(Node<'_, '_>) -> Option<Edit>) -> String {
        let document = parse_document(xml).unwrap();
        apply(xml, edit(document.root_element()).into_iter().collect()).unwrap()
    }

    #[test]
    fn a_tag_is_read_as_odd_as_it_may_be() {
        let odd = "<a\n\tx = '1>/'  xmlns:n=\"urn:n\"\r\ny=\"2\" n:y='3'  />";
        let set = |name, value| edited(odd, |root| set_attribute(odd, root, name, value));
        assert_eq!(set("x", "1>/"), odd);
        assert_eq!(set("x", "7"), odd.replace("1>/", "7"));
        assert_eq!(set("y", "\"'"), odd.replace("y=\"2\"", "y=\"&quot;&apos;\""));
        assert_eq!(set("z", "<&"), odd.replace("n:y='3'", "n:y='3' z='&lt;&amp;'"));
        assert_eq!(
            edited(odd, |root| remove_attribute(odd, root, "y")),
            odd.replace("\r\ny=\"2\"", "")
        );
        let child = Element::new("b");
        let closed = odd.replace("  />", ">\r\n  <b/>\r\n</a>");
        assert_eq!(
            edited(odd, |root| Some(insert(odd, root, Place::Last, &child))),
            closed
        );
    }

    #[test]
    fn a_child_is_laid_out_as_its_neighbours_are() {
        let child = Element::new("n").children([Element::new("m").text("<")]);
        for (xml, expected) in [
            ("<a></a>", "<a>\n  <n>\n    <m>&lt;</m>\n  </n>\n</a>"),
            ("<a> <b/> </a>", "<a> <b/><n><m>&lt;</m></n> </a>"),
            (
                "<a>\r\n\t<b/>\r\n</a>",
                "<a>\r\n\t<b/>\r\n\t<n>\r\n\t\t<m>&lt;</m>\r\n\t</n>\r\n</a>",
            ),
            (
                "<a>\n   <b/><!-- c -->\n\n</a>",
                "<a>\n   <b/><!-- c -->\n   <n>\n      <m>&lt;</m>\n   </n>\n\n</a>",
            ),
        ] {
            assert_eq!(
                edited(xml, |root| Some(insert(xml, root, Place::Last, &child))),
                expected
            );
        }
    }

    #[test]
    fn edits_that_overlap_are_refused() {
        let edit = |at| Edit { at, with: "-".into() };
        assert_eq!(apply("abcd", vec![edit(1..3), edit(2..4)]), None);
        assert_eq!(apply("abcd", vec![edit(2..9)]), None);
        assert_eq!(
            apply("abcd", vec![edit(3..3), edit(0..1), edit(3..4)]).unwrap(),
            "-bc--"
        );
    }
}

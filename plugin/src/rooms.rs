//! That the rooms of ARCHITECTURE.md are kept: a room names only lower ones, and no files or folders go in a circle.
//!
//! Read from the sources: `use`, and every other path through `crate`, `self`, `super` or a name in scope, in macros too. A name that
//! a module hands on stands for the module that defines it. Left out are what is under `#[cfg(test)]`, and what a module and those
//! inside of it name of each other: they are one thing, told in several files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// From the ground up. Rooms on one line don't name each other either.
const FLOORS: [&[&str]; 16] = [
    &["secret", "terminal", "fuzz_target"],
    &["crypto"],
    &["model"],
    &["domain"],
    &["advice", "api", "audit"],
    &["host"],
    &["store"],
    &["provider"],
    &["recipients"],
    &["object", "state_backup"],
    &["config"],
    &["vm"],
    &["job"],
    &["daemon", "inside"],
    &["cli"],
    &["fuzz"],
];

/// The names from the crate's root on.
type ModulePath = Vec<String>;

#[derive(Default)]
struct Module {
    /// What `use` brings into scope, and its path.
    imports: BTreeMap<String, Vec<String>>,
    /// Which of that is for others to take from here.
    handed_on: BTreeSet<String>,
    /// All other paths; single names too.
    paths: BTreeSet<Vec<String>>,
}

/// One crate.
struct House(BTreeMap<ModulePath, Module>);

/// Somebody names what another module defines.
struct Arrow<'a> {
    from: &'a [String],
    to: &'a [String],
    name: String,
}

impl House {
    /// # Panics
    /// Where a file is not there, or is no Rust.
    fn read(root: &Path) -> Self {
        let mut house = Self(BTreeMap::new());
        house.add_file(Vec::new(), root, root.parent().unwrap());
        house
    }

    fn add_file(&mut self, path: ModulePath, file: &Path, below: &Path) {
        let source = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let tokens = source
            .parse()
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.add(path, tokens, below);
    }

    /// The files of the modules inside are in the folder `below`.
    fn add(&mut self, path: ModulePath, tokens: TokenStream, below: &Path) {
        let mut module = Module::default();
        for (name, body) in module.take(tokens) {
            let inner = [&path[..], std::slice::from_ref(&name)].concat();
            let folder = below.join(&name);
            match body {
                Some(body) => self.add(inner, body, &folder),
                None => self.add_file(inner, &below.join(format!("{name}.rs")), &folder),
            }
        }
        self.0.insert(path, module);
    }

    /// The module that defines what `path` names where it stands in the module `at`; none for what is of another crate, or of the
    /// module itself.
    fn definer(&self, mut at: ModulePath, path: &[String]) -> Option<&[String]> {
        let first = path.first()?;
        let is_known =
            |at: &ModulePath| self.child(at, first).is_some() || self.0[at].imports.contains_key(first);
        if !["crate", "self", "super"].contains(&first.as_str()) && !is_known(&at) {
            return None;
        }
        for (nth, name) in path.iter().enumerate() {
            match name.as_str() {
                "crate" => at.clear(),
                "self" => {}
                "super" => drop(at.pop()?),
                name => match (self.child(&at, name), self.0[&at].imports.get(name)) {
                    (Some(child), _) => at = child,
                    (None, Some(target)) if target[0] != name => {
                        return self.definer(at, &[target, &path[nth + 1..]].concat());
                    }
                    _ => break,
                },
            }
        }
        Some(self.0.get_key_value(&at)?.0)
    }

    fn child(&self, of: &[String], name: &str) -> Option<ModulePath> {
        let path = [of, &[name.to_owned()]].concat();
        self.0.contains_key(&path).then_some(path)
    }

    fn arrows(&self) -> Vec<Arrow<'_>> {
        let mut arrows = Vec::new();
        for (from, module) in &self.0 {
            let is_used = |name: &String| module.paths.iter().any(|path| path[0] == *name);
            let imports = module.imports.iter();
            let imports = imports.filter(|(name, _)| !module.handed_on.contains(*name) || is_used(name));
            for path in imports.map(|(_, path)| path).chain(&module.paths) {
                if let Some(to) = self.definer(from.clone(), path)
                    && !to.starts_with(from)
                    && !from.starts_with(to)
                {
                    let name = path.join("::");
                    arrows.push(Arrow { from, to, name });
                }
            }
        }
        arrows
    }

    /// The arrows between modules beside each other, each with all that is in it, that lie on a circle; with the folder.
    fn circles(&self) -> Vec<(String, String)> {
        let mut beside: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for arrow in self.arrows() {
            let above = arrow
                .from
                .iter()
                .zip(arrow.to)
                .take_while(|(one, other)| one == other);
            let above = above.count();
            let ends = (&arrow.from[above], &arrow.to[above]);
            beside
                .entry(&arrow.from[..above])
                .or_default()
                .push((ends, arrow));
        }
        let mut found = Vec::new();
        for (folder, arrows) in beside {
            let leads = |from, to| {
                let (mut reached, mut open) = (BTreeSet::new(), vec![from]);
                while let Some(at) = open.pop() {
                    let next = arrows.iter().filter(|((from, _), _)| *from == at);
                    open.extend(next.map(|((_, to), _)| *to).filter(|to| reached.insert(*to)));
                }
                reached.contains(to)
            };
            let circular = arrows.iter().filter(|((from, to), _)| leads(to, from));
            let folder = folder.join("::");
            found.extend(circular.map(|(_, arrow)| (folder.clone(), arrow.to_string())));
        }
        found
    }

    /// The arrows that lead from a room to one that is not below it.
    fn upwards(&self, floors: &[&[&str]]) -> Vec<String> {
        let floor = |room: &str| floors.iter().position(|rooms| rooms.contains(&room));
        let is_upwards = |arrow: &Arrow<'_>| {
            let (from, to) = (&arrow.from[0], &arrow.to[0]);
            from != to && floor(from) <= floor(to)
        };
        let arrows = self.arrows().into_iter().filter(is_upwards);
        arrows.map(|arrow| arrow.to_string()).collect()
    }
}

impl std::fmt::Display for Arrow<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} names {} ({})",
            self.from.join("::"),
            self.to.join("::"),
            self.name
        )
    }
}

impl Module {
    /// Notes what `tokens` name. What comes back are the modules in them, with the body where it is there.
    fn take(&mut self, tokens: TokenStream) -> Vec<(String, Option<TokenStream>)> {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let (mut inner, mut at) = (Vec::new(), 0);
        while let Some(token) = tokens.get(at) {
            at += 1;
            match (token, tokens.get(at)) {
                (TokenTree::Punct(punct), Some(next)) if punct.as_char() == '#' && is_cfg_test(next) => {
                    at += 1 + item_len(&tokens[at + 1..]);
                }
                (TokenTree::Group(group), _) => inner.extend(self.take(group.stream())),
                (TokenTree::Ident(word), Some(TokenTree::Ident(name))) if *word == "mod" => {
                    let body = match tokens.get(at + 1) {
                        Some(TokenTree::Group(group)) => Some(group.stream()),
                        _ => None,
                    };
                    inner.push((name.to_string(), body));
                    at += 2;
                }
                // Not the `use<…>` of a type.
                (TokenTree::Ident(word), Some(next)) if *word == "use" && !is_punct(next, '<') => {
                    let len = tokens[at..].iter().position(|token| is_punct(token, ';'));
                    let end = at + len.expect("a use ends with a semicolon");
                    let imports = leaves(&[], &tokens[at..end]);
                    if has_visibility(&tokens[..at - 1]) {
                        self.handed_on.extend(imports.keys().cloned());
                    }
                    self.imports.extend(imports);
                    at = end;
                }
                (TokenTree::Ident(first), _) => {
                    let mut path = vec![first.to_string()];
                    while let [one, other, TokenTree::Ident(next), ..] = &tokens[at..]
                        && is_punct(one, ':')
                        && is_punct(other, ':')
                    {
                        path.push(next.to_string());
                        at += 3;
                    }
                    self.paths.insert(path);
                }
                _ => {}
            }
        }
        inner
    }
}

/// Each name that a `use` brings, with its path; a glob by its module.
fn leaves(above: &[String], tree: &[TokenTree]) -> BTreeMap<String, Vec<String>> {
    let mut path = above.to_vec();
    let mut tokens = tree.iter();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Ident(word) if *word == "as" => {
                let name = tokens.next().expect("a name follows as").to_string();
                return BTreeMap::from([(name, path)]);
            }
            TokenTree::Ident(word) if *word == "self" && !path.is_empty() => {}
            TokenTree::Ident(word) => path.push(word.to_string()),
            TokenTree::Group(group) => {
                let tokens: Vec<_> = group.stream().into_iter().collect();
                let branches = tokens.split(|token| is_punct(token, ','));
                return branches.flat_map(|branch| leaves(&path, branch)).collect();
            }
            TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
    let is_leaf = !tree.is_empty() && !path.is_empty();
    let leaf = is_leaf.then(|| (path[path.len() - 1].clone(), path));
    leaf.into_iter().collect()
}

fn has_visibility(before: &[TokenTree]) -> bool {
    match before {
        [.., TokenTree::Ident(word)] | [.., TokenTree::Ident(word), TokenTree::Group(_)] => *word == "pub",
        _ => false,
    }
}

fn is_cfg_test(attribute: &TokenTree) -> bool {
    attribute.to_string().replace(' ', "") == "[cfg(test)]"
}

fn is_punct(token: &TokenTree, punct: char) -> bool {
    matches!(token, TokenTree::Punct(found) if found.as_char() == punct)
}

/// Of the item, the field or the arm that `tokens` begin with: up to a semicolon, a comma, or the braces of a body.
fn item_len(tokens: &[TokenTree]) -> usize {
    let is_use = |token: &TokenTree| matches!(token, TokenTree::Ident(word) if *word == "use");
    let is_use = tokens.iter().take(3).any(is_use);
    let is_body = |token: &TokenTree| {
        matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace) && !is_use
    };
    let is_end = |token: &TokenTree| is_body(token) || is_punct(token, ';') || is_punct(token, ',');
    tokens.iter().position(is_end).map_or(tokens.len(), |end| end + 1)
}

fn this_crate() -> House {
    House::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs"))
}

#[test]
fn no_files_go_in_a_circle() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let roots = ["hooks/src/main.rs", "swtpm-state/src/lib.rs", "plugin/src/lib.rs"];
    let houses = roots.map(|root| House::read(&beside.join(root)));
    let circles = houses.iter().flat_map(House::circles);
    let found: Vec<_> = circles.map(|(_, arrow)| arrow).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn no_room_names_one_above_it() {
    let house = this_crate();
    let rooms = house
        .0
        .keys()
        .filter(|path| path.len() == 1)
        .map(|path| path[0].as_str());
    let listed: BTreeSet<_> = FLOORS.concat().into_iter().collect();
    assert_eq!(rooms.collect::<BTreeSet<_>>(), listed, "each room has a floor");
    let found = house.upwards(&FLOORS);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// What follows for a vTPM is asked of `ObjectKind`, so that another kind of object, or another form of one, is met where it differs.
#[test]
fn a_vtpm_is_a_case_of_its_own_in_three_files() {
    let house = this_crate();
    let is_case = |path: &Vec<String>| path.len() > 1 && path.last().is_some_and(|name| name == "Vtpm");
    let modules = house
        .0
        .iter()
        .filter(|(_, module)| module.paths.iter().any(is_case));
    let found: Vec<_> = modules.map(|(path, _)| path.join("::")).collect();
    // What it is, where the XML has it, how it is sealed.
    assert_eq!(found, ["domain::objects", "model::envelope", "vm::seal::vtpm"]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn house(files: &[(&str, &str)]) -> House {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = folder.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        House::read(&folder.path().join("lib.rs"))
    }

    #[test]
    fn a_circle_of_files_is_found_however_it_is_written() {
        let ways = [
            "use crate::b::B;",
            "use super::b::{self};",
            "use {super::b::B as Other, std::fs};",
            "fn f() { crate::b::g(); }",
            "fn f() { assert!(super::b::g()); }",
            "use crate::face::B;",
            "use crate::face; fn f() { face::B::g(); }",
            "mod inner { use super::super::b::B; }",
        ];
        for way in ways {
            let found = house(&[
                ("lib.rs", "mod a; mod b; mod face;"),
                ("a.rs", way),
                ("b.rs", "use crate::a::A; struct B;"),
                ("face.rs", "pub(crate) use crate::b::B;"),
            ]);
            assert_eq!(found.circles().len(), 2, "{way}: {:?}", found.circles());
        }
    }

    #[test]
    fn a_circle_of_folders_is_found_where_no_two_files_name_each_other() {
        let found = house(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "mod low; mod high;"),
            ("a/low.rs", ""),
            ("a/high.rs", "use crate::b::B;"),
            ("b.rs", "use crate::a::low::L; struct B;"),
        ]);
        assert_eq!(found.circles().len(), 2, "{:?}", found.circles());
    }

    #[test]
    fn what_is_no_circle_is_none() {
        let found = house(&[
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::B; mod inner; use inner::I; struct A;"),
            ("a/inner.rs", "use super::A; struct I;"),
            (
                "b.rs",
                "#[cfg(test)] use crate::a::A; /* crate::a::A */ const S: &str = \"crate::a::A\"; struct B;",
            ),
            (
                "c.rs",
                "#[cfg(test)] mod tests; pub(crate) use crate::a::A; use std::fs::a;",
            ),
        ]);
        assert!(found.circles().is_empty(), "{:?}", found.circles());
    }

    #[test]
    fn a_room_that_names_one_beside_or_above_it_is_found() {
        let found = house(&[
            ("lib.rs", "mod low; mod beside; mod high;"),
            ("low.rs", "mod deep;"),
            (
                "low/deep.rs",
                "fn f() { crate::high::g(); } use crate::beside::B;",
            ),
            ("beside.rs", "struct B;"),
            ("high.rs", "use crate::low::L;"),
        ]);
        let found = found.upwards(&[&["low", "beside"], &["high"]]);
        assert_eq!(
            found,
            [
                "low::deep names beside (crate::beside::B)",
                "low::deep names high (crate::high::g)"
            ]
        );
    }
}

//! Lists that may be long are answered a page at a time: a reply takes no more than a reader may send, whoever asks, and however
//! long the list is.
//!
//! A page ends with the name of its last item, and the next one begins behind that: what goes or comes meanwhile shifts nothing.

use serde::Serialize;

use super::finding::FindingView;
use super::provider::{OrphanEnvelope, OrphanKek, Orphans};
use super::vm::VmView;
use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};

/// The most bytes of a page, as JSON. What is around it in a reply has room beside it.
pub(crate) const PAGE: usize = 48 * 1024;
/// The same for root, who may get any message. A client of zlink takes 256 bytes at a time until its buffer has grown to a page.
pub(crate) const PAGE_OF_ROOT: usize = 192 * 1024;
/// A page has as much at least, however much else there is in its reply.
const LEAST: usize = 8 * 1024;

/// How many bytes `item` takes in a reply.
pub(crate) fn size_of(item: &impl Serialize) -> usize {
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // Only what can't be JSON fails, and no reply has it.
    let _ = serde_json::to_writer(&mut count, item);
    count.0 + 1
}

/// How many of `items`, from the first one, fit into `bytes`; one at least.
fn fitting(items: &[impl Serialize], bytes: usize) -> usize {
    within(items, bytes).max(1).min(items.len())
}

fn within(items: &[impl Serialize], bytes: usize) -> usize {
    let mut left = bytes;
    let fits = items.iter().take_while(|item| {
        let size = size_of(item);
        let fits = size <= left;
        left = left.saturating_sub(size);
        fits
    });
    fits.count()
}

/// The first of `items` that fit into `bytes`, where a reply says how many there are.
pub(crate) fn cut<T: Serialize>(mut items: Vec<T>, bytes: usize) -> Vec<T> {
    let most = within(&items, bytes);
    items.truncate(most);
    items
}

/// The VMs after the one with this UUID and name, or the first ones; and what to ask for next, if there are more. The reply has
/// `room` for them.
pub(crate) fn of_vms(vms: &[VmView], after: Option<&str>, room: usize) -> (Vec<VmView>, Option<String>) {
    let (uuid, name) = after.and_then(|after| after.split_once(' ')).unwrap_or_default();
    let begin = match after {
        Some(_) => vms.partition_point(|vm| (vm.name.as_str(), vm.uuid.as_str()) <= (name, uuid)),
        None => 0,
    };
    let rest = &vms[begin..];
    let room = room.max(LEAST);
    let page = &rest[..fitting(rest, room)];
    let next = page.last().filter(|_| page.len() < rest.len());
    let next = next.map(|last| format!("{} {}", last.uuid, last.name));
    (page.iter().map(|vm| shortened(vm, room)).collect(), next)
}

/// One VM that has no room on a page is shown in part.
fn shortened(vm: &VmView, room: usize) -> VmView {
    let mut shown = vm.clone();
    if size_of(vm) <= room {
        return shown;
    }
    shown.objects = cut(std::mem::take(&mut shown.objects), room / 2);
    shown.warnings = cut(std::mem::take(&mut shown.warnings), room / 4);
    let cut = format!(
        "only {} of its {} objects and {} of {} warnings are listed here",
        shown.objects.len(),
        vm.objects.len(),
        shown.warnings.len(),
        vm.warnings.len(),
    );
    let cut = Finding::warning(FindingCode::Shortened, Subject::Vm(vm.name.clone()), cut)
        .next(Advice::ShowVm(vm.uuid.clone()));
    shown.warnings.push(FindingView::from(&cut));
    shown
}

/// The orphans after this one, or the first ones, in the order of [`sort`].
pub(crate) fn of_orphans(all: &Orphans, after: Option<&str>) -> Orphans {
    let (list, rest) = after.and_then(|after| after.split_once(' ')).unwrap_or_default();
    let (first, second) = rest.split_once(' ').unwrap_or_default();
    let (envelopes, keks) = match list {
        "envelope" => {
            let known = |orphan: &OrphanEnvelope| key_of(orphan) <= (second, first);
            (all.envelopes.partition_point(known), 0)
        }
        "kek" => {
            let known = |orphan: &OrphanKek| key_of_kek(orphan) <= (first, second);
            (all.envelopes.len(), all.keks.partition_point(known))
        }
        _ => (0, 0),
    };
    let (envelopes, keks) = (&all.envelopes[envelopes..], &all.keks[keks..]);
    let damaged = match after {
        None => cut(all.damaged.clone(), PAGE / 4),
        Some(_) => Vec::new(),
    };
    let room = PAGE - size_of(&damaged).min(PAGE / 2);
    let page = envelopes[..fitting(envelopes, room)].to_vec();
    if page.len() < envelopes.len() {
        let next = page
            .last()
            .map(|last| format!("envelope {} {}", last.envelope, last.vm));
        return Orphans {
            envelopes: page,
            keks: Vec::new(),
            damaged,
            next,
        };
    }
    let room = room.saturating_sub(size_of(&page)).max(LEAST);
    let shown = keks[..fitting(keks, room)].to_vec();
    let last = shown.last().filter(|_| shown.len() < keks.len());
    let next = last.map(|last| format!("kek {} {}", last.provider, last.kek));
    Orphans {
        envelopes: page,
        keks: shown,
        damaged,
        next,
    }
}

/// Puts orphans into the order of their pages.
pub(crate) fn sort(orphans: &mut Orphans) {
    orphans.envelopes.sort_by(|a, b| key_of(a).cmp(&key_of(b)));
    orphans.keks.sort_by(|a, b| key_of_kek(a).cmp(&key_of_kek(b)));
}

fn key_of(orphan: &OrphanEnvelope) -> (&str, &str) {
    (&orphan.vm, &orphan.envelope)
}

fn key_of_kek(orphan: &OrphanKek) -> (&str, &str) {
    (&orphan.provider, &orphan.kek)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::KekOrigin;
    use crate::model::envelope::ObjectKind;

    /// What a reader may get in one message.
    const MESSAGE: usize = 64 * 1024;

    #[test]
    fn pages_show_each_vm_once_also_when_one_goes_meanwhile() {
        let mut vms: Vec<_> = (0..3000)
            .map(|n| VmView::fixture(&format!("web {:05}", n / 2), n as u128))
            .collect();
        let (mut found, mut after, mut pages) = (Vec::new(), None, 0);
        loop {
            let (page, next) = of_vms(&vms, after.as_deref(), PAGE);
            assert!(size_of(&page) <= MESSAGE, "{}", size_of(&page));
            let length = page.len();
            found.extend(page.into_iter().map(|vm| vm.uuid));
            // The last one that was shown is deleted.
            if pages == 0 {
                vms.remove(length - 1);
            }
            pages += 1;
            after = next;
            if after.is_none() {
                break;
            }
        }
        assert!(pages > 5, "{pages}");
        assert_eq!(found.len(), 3000);
        found.dedup();
        assert_eq!(found.len(), 3000);
        assert!(matches!(of_vms(&[], None, PAGE), (none, None) if none.is_empty()));
        assert!(of_vms(&vms, Some("garbage"), PAGE).1.is_some());
    }

    #[test]
    fn a_vm_that_fills_more_than_a_page_is_shown_in_part() {
        let mut huge = VmView::fixture("huge", 1);
        huge.warnings = (0..3000)
            .map(|n| {
                Finding::warning(
                    FindingCode::Plaintext,
                    Subject::Host,
                    format!("warning {n} {}", "x".repeat(50)),
                )
            })
            .map(|finding| FindingView::from(&finding))
            .collect();
        let (page, next) = of_vms(&[huge, VmView::fixture("next", 2)], None, PAGE - 30 * 1024);
        assert!(size_of(&page) + 30 * 1024 <= MESSAGE, "{}", size_of(&page));
        let last = page[0].warnings.last().unwrap().to_string();
        assert!(
            last.contains("of 3000 warnings") && last.contains("virtseal vm status"),
            "{last}"
        );
        let (page, next) = of_vms(
            &[VmView::fixture("huge", 1), VmView::fixture("next", 2)],
            next.as_deref(),
            PAGE,
        );
        assert_eq!((page[0].name.as_str(), next), ("next", None));
    }

    fn orphans(envelopes: usize, keks: usize) -> Orphans {
        let envelope = |n: usize| OrphanEnvelope {
            envelope: uuid::Uuid::from_u128(n as u128).to_string(),
            vm: format!("my vm {:03}", n % 700),
            kind: ObjectKind::Disk.into(),
            path: Some(format!("/images/{n}.qcow2")),
            present: n.is_multiple_of(2),
            vm_defined: n.is_multiple_of(3),
            providers: vec!["main".to_owned()],
        };
        let kek = |n: usize| OrphanKek {
            provider: format!("kms{}", n % 3),
            kek: format!("{n} of many"),
            envelopes: 1,
            copies: 0,
            origin: KekOrigin::Retired.into(),
        };
        let damaged = |n| {
            let what = format!("row {n} can't be read");
            Finding::critical(FindingCode::RecordDamaged, Subject::Host, what).into()
        };
        let mut all = Orphans {
            envelopes: (0..envelopes).map(envelope).collect(),
            keks: (0..keks).map(kek).collect(),
            damaged: (0..keks).map(damaged).collect(),
            next: None,
        };
        sort(&mut all);
        all
    }

    #[test]
    fn pages_show_each_orphan_once() {
        for (envelopes, keks) in [(0, 0), (3, 2), (3000, 0), (0, 3000), (2000, 2000)] {
            let all = orphans(envelopes, keks);
            let (mut seen, mut after) = (orphans(0, 0), None);
            loop {
                let page = of_orphans(&all, after.as_deref());
                assert!(size_of(&page) <= MESSAGE, "{}", size_of(&page));
                seen.envelopes.extend(page.envelopes);
                seen.keks.extend(page.keks);
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
            let names = |orphans: &Orphans| {
                let envelopes = orphans.envelopes.iter().map(|orphan| orphan.envelope.clone());
                let keks = orphans.keks.iter().map(|orphan| orphan.kek.clone());
                envelopes.chain(keks).collect::<Vec<_>>()
            };
            assert_eq!(names(&seen), names(&all));
        }
        assert!(of_orphans(&orphans(3, 3), Some("garbage")).envelopes.len() == 3);
    }
}

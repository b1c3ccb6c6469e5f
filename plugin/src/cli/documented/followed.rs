//! That each advice leads somewhere: a story has done what it says, as it was printed, or it stands here why none can.
//!
//! A case of `Advice` that is new has no row, and this fails. A row names the story and how the way begins that it takes there
//! (`Way` of the testkit), and both are looked up in the story's source.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::cli::advised::{cases, every_advice, name_of};

/// Who has done what it says.
enum By {
    /// `tests/tests/FILE`, the function, and the beginning of the way, or of the command in it.
    Story(&'static str, &'static str, &'static str),
    /// Why no story can, or need.
    Nobody(&'static str),
}

use By::{Nobody, Story};

const NO_COMMAND: &str = "it names nothing to run";
const BY_SYSTEMD: &str =
    "stories have no systemd: tests/run-systemd starts, stops and reloads by it on a host that it has booted";
const OF_A_SERVER: &str =
    "it is done at the key server or the token, by its own tools: the conformance suite has the refusal";
const OF_A_TPM: &str = "host_tpm/ runs it on a TPM of its own, with the values that only that story has";
const SHOWS: &str = "it shows and leads on to what it shows: a test of the sources parses it";

const FOLLOWED: &[(&str, By)] = &[
    ("Words", Nobody(NO_COMMAND)),
    ("Joined", Nobody("its parts stand here themselves")),
    // The host and its jobs.
    ("ShowStatus", Nobody(SHOWS)),
    (
        "ListJobs",
        Story(
            "told.rs",
            "a_job_that_waits_is_ended_or_helped_as_it_says",
            "virtseal jobs",
        ),
    ),
    (
        "VerifyAudit",
        Story(
            "told.rs",
            "what_is_lost_of_the_host_is_seen_and_comes_back_as_it_says",
            "virtseal audit verify",
        ),
    ),
    (
        "WatchJob",
        Story(
            "told.rs",
            "a_job_that_waits_is_ended_or_helped_as_it_says",
            "virtseal jobs watch",
        ),
    ),
    (
        "AbortJob",
        Story(
            "told.rs",
            "a_job_that_waits_is_ended_or_helped_as_it_says",
            "virtseal jobs abort",
        ),
    ),
    (
        "AbortTheJob",
        Nobody("of a job that a later virtseald has begun: a unit test of jobs reads such a row"),
    ),
    (
        "ResumeJob",
        Story(
            "told.rs",
            "a_job_that_waits_is_ended_or_helped_as_it_says",
            "virtseal jobs resume",
        ),
    ),
    (
        "BackUpState",
        Nobody(
            "the last resort of a rotation that lost its root key, which no story can lose: documentation.rs runs the command",
        ),
    ),
    (
        "RestoreState",
        Nobody("of a keystore that SQLite finds damaged: state.rs restores one"),
    ),
    (
        "RestoreStateOver",
        Story(
            "told.rs",
            "what_is_lost_of_the_host_is_seen_and_comes_back_as_it_says",
            "virtseal state restore --yes-replace",
        ),
    ),
    ("Journal", Nobody(BY_SYSTEMD)),
    ("StartDaemon", Nobody(BY_SYSTEMD)),
    ("StartAll", Nobody(BY_SYSTEMD)),
    ("StopAll", Nobody(BY_SYSTEMD)),
    ("RestartDaemon", Nobody(BY_SYSTEMD)),
    ("ReloadDaemon", Nobody(BY_SYSTEMD)),
    ("ShowDaemon", Nobody(BY_SYSTEMD)),
    ("StartAnew", Nobody(BY_SYSTEMD)),
    ("CheckSettings", Nobody(BY_SYSTEMD)),
    ("RestartLibvirtd", Nobody(BY_SYSTEMD)),
    ("ReloadLibvirtd", Nobody(BY_SYSTEMD)),
    ("ShowLibvirtd", Nobody(BY_SYSTEMD)),
    ("Upgrade", Nobody(NO_COMMAND)),
    ("RunAsRoot", Nobody(NO_COMMAND)),
    // Providers.
    (
        "ListProviders",
        Story(
            "told.rs",
            "a_host_without_a_provider_gets_one_and_a_vm_starts",
            "virtseal provider list",
        ),
    ),
    (
        "AddNative",
        Story(
            "told.rs",
            "a_host_without_a_provider_gets_one_and_a_vm_starts",
            "virtseal provider add native",
        ),
    ),
    ("AddProviderHelp", Nobody(SHOWS)),
    ("ShowProvider", Nobody(SHOWS)),
    (
        "SetUntried",
        Nobody("KEY=VALUE is what was refused: providers.rs sets it"),
    ),
    (
        "UnlockProvider",
        Story(
            "told.rs",
            "a_host_without_a_provider_gets_one_and_a_vm_starts",
            "virtseal provider unlock main",
        ),
    ),
    (
        "UnlockByTpm",
        Story(
            "host_tpm/main.rs",
            "a_pin_is_asked_for_and_signed_kernels_need_no_passphrase",
            "virtseal provider unlock main --tpm",
        ),
    ),
    ("UnlockByFile", Nobody(OF_A_SERVER)),
    (
        "UnlockByPin",
        Story(
            "host_tpm/main.rs",
            "a_pin_is_asked_for_and_signed_kernels_need_no_passphrase",
            "virtseal provider unlock main --tpm",
        ),
    ),
    ("LockProvider", Nobody(OF_A_SERVER)),
    (
        "BackUpProvider",
        Story(
            "told.rs",
            "a_host_without_a_provider_gets_one_and_a_vm_starts",
            "virtseal provider backup main",
        ),
    ),
    (
        "RestoreProvider",
        Story(
            "told.rs",
            "a_provider_is_given_up_and_comes_back_as_it_says",
            "virtseal provider restore spare",
        ),
    ),
    (
        "RestoreProviderFrom",
        Nobody("printed with the way back from a deletion without loss: planted_paths.rs has the file"),
    ),
    ("AddAgain", Nobody(OF_A_SERVER)),
    (
        "BringBack",
        Nobody("as RestoreProvider, where the kind is not known: moves.rs restores"),
    ),
    (
        "RotateProvider",
        Nobody("of a lost passphrase: docs/recovery.md, which documentation.rs reads"),
    ),
    (
        "MoveProvider",
        Story(
            "told.rs",
            "a_job_that_waits_is_ended_or_helped_as_it_says",
            "virtseal provider move",
        ),
    ),
    (
        "MakeDefault",
        Story(
            "told.rs",
            "a_provider_is_given_up_and_comes_back_as_it_says",
            "virtseal provider default",
        ),
    ),
    (
        "DeleteProvider",
        Story(
            "told.rs",
            "a_provider_is_given_up_and_comes_back_as_it_says",
            "virtseal provider delete spare",
        ),
    ),
    (
        "ForceDelete",
        Nobody("the last resort of a rotation that lost its root key, with BackUpState"),
    ),
    (
        "AddRecipient",
        Story(
            "told.rs",
            "a_provider_is_given_up_and_comes_back_as_it_says",
            "virtseal provider recipients add",
        ),
    ),
    (
        "RemoveRecipient",
        Story(
            "told.rs",
            "a_provider_is_given_up_and_comes_back_as_it_says",
            "virtseal provider recipients remove",
        ),
    ),
    ("ListOrphans", Nobody(SHOWS)),
    (
        "CacheInMemory",
        Story(
            "host_tpm/main.rs",
            "kept_keys_start_vms_after_a_reboot_while_the_kms_is_down",
            "virtseal provider cache",
        ),
    ),
    ("CacheOnDisk", Nobody(OF_A_TPM)),
    (
        "EnrollTpm",
        Story(
            "host_tpm/main.rs",
            "tpm_unlocks_at_start_until_the_host_boots_otherwise",
            "virtseal provider tpm main --enroll",
        ),
    ),
    ("TrustProvider", Nobody(OF_A_SERVER)),
    ("TrustCa", Nobody(OF_A_SERVER)),
    ("SetIdentity", Nobody(OF_A_SERVER)),
    ("EncryptIdentity", Nobody(OF_A_SERVER)),
    (
        "BindIdentity",
        Story(
            "host_tpm/credentials.rs",
            "kmip_key_by_the_tpm",
            "virtseal provider identity",
        ),
    ),
    ("RequestCertificate", Nobody(OF_A_SERVER)),
    ("RequestNewCertificate", Nobody(OF_A_SERVER)),
    ("TrustSigner", Nobody(OF_A_SERVER)),
    ("OtherCertificate", Nobody(OF_A_SERVER)),
    ("LogInByCertificate", Nobody(OF_A_SERVER)),
    ("TransitTrust", Nobody(OF_A_SERVER)),
    ("NewPin", Nobody(OF_A_SERVER)),
    ("LogInElsewhere", Nobody(OF_A_SERVER)),
    ("UnsealServer", Nobody(OF_A_SERVER)),
    ("RestoreKek", Nobody(OF_A_SERVER)),
    // VMs.
    (
        "SealVm",
        Story(
            "odd_disks.rs",
            "a_volume_of_a_storage_pool_is_sealed_once_its_pool_tells_the_file",
            "virtseal vm seal",
        ),
    ),
    (
        "SealReplacing",
        Story(
            "told.rs",
            "what_is_refused_of_a_vm_is_done_as_it_says",
            "virtseal vm seal --replace",
        ),
    ),
    (
        "PlanSeal",
        Story(
            "told.rs",
            "what_is_refused_of_a_vm_is_done_as_it_says",
            "virtseal vm seal --dry-run",
        ),
    ),
    (
        "SealDeclared",
        Nobody("it leads to the refusal of a disk that holds data: formats.rs takes it"),
    ),
    (
        "UnsealVm",
        Story(
            "crash.rs",
            "vm_unseal_can_be_killed_at_every_step",
            "virtseal vm unseal",
        ),
    ),
    (
        "AdoptVm",
        Story(
            "conflict.rs",
            "a_damaged_row_is_named_and_its_way_out_heals",
            "virtseal vm adopt",
        ),
    ),
    (
        "AdoptFormat1",
        Story(
            "travelling.rs",
            "a_vm_of_format_1_is_adopted_where_root_says_so",
            "virtseal vm adopt --format-1",
        ),
    ),
    (
        "AdoptFrom",
        Story(
            "forgotten.rs",
            "a_vm_that_has_left_is_forgotten_and_comes_back",
            "virtseal vm adopt --from",
        ),
    ),
    ("ShowVm", Nobody(SHOWS)),
    (
        "ShowVms",
        Story(
            "status.rs",
            "what_many_vms_have_alike_is_one_thing",
            "virtseal vm status",
        ),
    ),
    (
        "RekeyVm",
        Story(
            "conflict.rs",
            "a_forged_version_of_the_same_generation_gives_way",
            "virtseal vm rekey",
        ),
    ),
    (
        "ForgetVm",
        Story(
            "told.rs",
            "a_vm_that_went_to_another_host_is_forgotten_and_comes_back_as_it_says",
            "virtseal vm forget",
        ),
    ),
    (
        "Autostart",
        Story(
            "told.rs",
            "what_is_refused_of_a_vm_is_done_as_it_says",
            "virtseal vm autostart",
        ),
    ),
    (
        "ShredVm",
        Nobody("of several VMs that had one name: its UUID in a command that stories run by the name"),
    ),
    (
        "ShredAsTyped",
        Story(
            "told.rs",
            "what_is_refused_of_a_vm_is_done_as_it_says",
            "virtseal vm shred --yes-shred=odd01",
        ),
    ),
    (
        "CommitSnapshot",
        Story(
            "snapshot/pivots.rs",
            "expect_both_ways",
            "virtseal vm snapshot commit",
        ),
    ),
    (
        "DeleteSnapshot",
        Nobody("snapshot/main.rs types it as it is printed"),
    ),
    (
        "ForceSnapshot",
        Story(
            "snapshot/pivots.rs",
            "a_vm_that_ran_on_its_sealed_image_keeps_what_it_wrote_there",
            "virtseal vm snapshot delete --force",
        ),
    ),
    (
        "ResetNvram",
        Story(
            "told.rs",
            "what_is_refused_of_a_vm_is_done_as_it_says",
            "virtseal vm nvram reset --yes-reset",
        ),
    ),
    (
        "RestoreEnvelope",
        Nobody("of an envelope that no copy opens: it names what to look for in a backup"),
    ),
    // Volumes.
    (
        "ShowVolume",
        Story(
            "told.rs",
            "what_is_refused_of_a_volume_is_done_as_it_says",
            "virtseal volume info",
        ),
    ),
    (
        "ForgetVolume",
        Story(
            "forgotten.rs",
            "a_deleted_image_is_forgotten_and_blocks_nothing",
            "virtseal volume forget",
        ),
    ),
    (
        "ForceForgetVolume",
        Story(
            "told.rs",
            "what_is_refused_of_a_volume_is_done_as_it_says",
            "virtseal volume forget --force",
        ),
    ),
    (
        "AdoptVolume",
        Story(
            "told.rs",
            "what_is_refused_of_a_volume_is_done_as_it_says",
            "virtseal volume adopt",
        ),
    ),
    (
        "CheckVolume",
        Story(
            "told.rs",
            "what_is_refused_of_a_volume_is_done_as_it_says",
            "virtseal volume check",
        ),
    ),
    (
        "ResizeVolume",
        Story(
            "told.rs",
            "what_is_refused_of_a_volume_is_done_as_it_says",
            "virtseal volume resize",
        ),
    ),
    (
        "ShrinkVolume",
        Story(
            "told.rs",
            "what_is_refused_of_a_volume_is_done_as_it_says",
            "virtseal volume resize --shrink",
        ),
    ),
    (
        "CreateVolume",
        Story(
            "ways_out.rs",
            "a_disk_that_is_missing_or_empty_is_made_as_it_says",
            "virtseal volume create",
        ),
    ),
    (
        "CreateVolumeFrom",
        Story(
            "ways_out.rs",
            "a_vm_that_has_run_in_plaintext_is_sealed_as_it_says",
            "virtseal volume create",
        ),
    ),
    (
        "ShareVolume",
        Story(
            "told.rs",
            "what_is_refused_of_a_volume_is_done_as_it_says",
            "virtseal volume share",
        ),
    ),
    // What libvirt does.
    (
        "ListDomains",
        Story(
            "told.rs",
            "a_host_without_a_provider_gets_one_and_a_vm_starts",
            "virsh list",
        ),
    ),
    (
        "EditXml",
        Story(
            "ways_out.rs",
            "an_xml_that_can_not_be_sealed_is_edited_as_it_says",
            "virsh edit",
        ),
    ),
    (
        "DefineXml",
        Story(
            "told.rs",
            "a_vm_that_went_to_another_host_is_forgotten_and_comes_back_as_it_says",
            "virsh define",
        ),
    ),
    (
        "DefineSealedXml",
        Story(
            "told.rs",
            "a_vm_that_went_to_another_host_is_forgotten_and_comes_back_as_it_says",
            "virsh define",
        ),
    ),
    ("StartVm", Story("ways_out.rs", "expect_sealed", "virsh start")),
    (
        "ShutDownVm",
        Story(
            "told.rs",
            "what_is_refused_of_a_vm_is_done_as_it_says",
            "virsh shutdown",
        ),
    ),
    (
        "UndefineVm",
        Story(
            "told.rs",
            "a_vm_that_went_to_another_host_is_forgotten_and_comes_back_as_it_says",
            "virsh undefine",
        ),
    ),
    (
        "RenameVm",
        Story(
            "ways_out.rs",
            "a_vm_is_stopped_or_renamed_first_as_it_says",
            "virsh domrename",
        ),
    ),
    (
        "AutostartByLibvirt",
        Story(
            "told.rs",
            "what_is_refused_of_a_vm_is_done_as_it_says",
            "virsh autostart",
        ),
    ),
    (
        "DropSavedState",
        Story(
            "ways_out.rs",
            "a_vm_is_stopped_or_renamed_first_as_it_says",
            "virsh managedsave-remove",
        ),
    ),
    (
        "RestoreSaved",
        Nobody("FILE is what an admin has saved: status.rs names it"),
    ),
    (
        "DetachDisk",
        Story(
            "odd_disks.rs",
            "a_floppy_is_made_read_only_or_taken_out_and_a_cd_stays",
            "virsh detach-disk",
        ),
    ),
    (
        "ListSnapshots",
        Story(
            "told.rs",
            "what_is_refused_of_a_vm_is_done_as_it_says",
            "virsh snapshot-list",
        ),
    ),
    (
        "StartPool",
        Story(
            "odd_disks.rs",
            "a_volume_of_a_storage_pool_is_sealed_once_its_pool_tells_the_file",
            "virsh pool-start",
        ),
    ),
    (
        "RefreshPool",
        Story(
            "odd_disks.rs",
            "a_volume_of_a_storage_pool_is_sealed_once_its_pool_tells_the_file",
            "virsh pool-refresh",
        ),
    ),
    (
        "AbortBlockJob",
        Nobody("a copy in the making: side_doors.rs ends a backup, by AbortDomainJob"),
    ),
    (
        "AbortDomainJob",
        Story(
            "side_doors.rs",
            "copies_and_backups_to_plain_files_are_found_and_to_encrypted_ones_are_not",
            "virsh domjobabort",
        ),
    ),
];

fn source(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/tests")
        .join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// From its name to its end.
fn body<'s>(source: &'s str, function: &str) -> Option<&'s str> {
    let (_, rest) = source.split_once(&format!("fn {function}("))?;
    let ends = ["\n}\n", "\n    }\n"].iter().filter_map(|end| rest.find(end));
    let method = source.contains(&format!("    fn {function}("));
    let end = if method { ends.min()? } else { rest.find("\n}\n")? };
    Some(&rest[..end])
}

#[test]
fn every_advice_has_a_story_or_a_reason() {
    let all = cases(include_str!("../../model/advice.rs"), "Advice");
    let listed: BTreeSet<_> = FOLLOWED.iter().map(|(case, _)| (*case).to_owned()).collect();
    assert_eq!(listed.len(), FOLLOWED.len(), "a case stands here twice");
    assert_eq!(
        all.difference(&listed).collect::<Vec<_>>(),
        [""; 0],
        "who follows these?"
    );
    assert_eq!(
        listed.difference(&all).collect::<Vec<_>>(),
        [""; 0],
        "there are none"
    );
}

#[test]
fn every_story_takes_the_way() {
    let mut printed: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for advice in every_advice() {
        let case = name_of(&format!("{advice:?}"));
        printed.entry(case).or_default().push(advice.to_string());
    }
    let mut followed = 0;
    for (case, by) in FOLLOWED {
        let (file, function, begin) = match by {
            Nobody(why) => {
                assert!(why.len() > 10, "{case}");
                continue;
            }
            Story(file, function, begin) => (file, function, begin),
        };
        let source = source(file);
        let body = body(&source, function).unwrap_or_else(|| panic!("{case}: no {function} in {file}"));
        let is_taken = body.contains(&format!("\"{begin}")) && source.contains("Way::");
        assert!(
            is_taken,
            "{case}: {function} in {file} takes no way that begins with {begin:?}"
        );
        let length = if begin.starts_with("virtseal ") { 3 } else { 2 };
        let command: Vec<_> = begin.split(' ').take(length).collect();
        let says = printed[*case]
            .iter()
            .any(|text| text.contains(&command.join(" ")));
        assert!(says, "{case} does not say {begin:?}");
        followed += 1;
    }
    assert!(followed > 50, "only {followed} are followed");
}

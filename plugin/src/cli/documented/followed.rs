//! That each advice leads somewhere: a story has done what it says, as it was printed, or it stands here why none can.
//!
//! A case of `Advice` that is new has no row, and this fails. A row names the story and how the way begins that it takes there
//! (`Way` of the testkit), and both are looked up in the story's source. What systemd does is followed in `tests/run-systemd`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::cli::advised::{cases, every_advice, name_of};

/// Who has done what it says.
enum By {
    /// `tests/tests/FILE`, the function, and the beginning of the way, or of the command in it.
    Story(&'static str, &'static str, &'static str),
    /// `tests/run-systemd`, on a host that systemd has booted: the beginning of the command.
    Booted(&'static str),
    /// Why no story can, or need.
    Nobody(&'static str),
}

use By::{Booted, Nobody, Story};

const NO_COMMAND: &str = "it names nothing to run";
const BOOTED: &str = include_str!("../../../../tests/run-systemd");

const FOLLOWED: &[(&str, By)] = &[
    ("Words", Nobody(NO_COMMAND)),
    ("Joined", Nobody("its parts stand here themselves")),
    // The host and its jobs.
    (
        "ShowStatus",
        Story(
            "conflict.rs",
            "a_damaged_row_is_named_and_its_way_out_heals",
            "virtseal status",
        ),
    ),
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
        Story(
            "told.rs",
            "a_job_of_another_version_is_ended_as_it_says",
            "virtseal jobs abort",
        ),
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
        Story(
            "told.rs",
            "a_provider_with_an_older_root_key_gets_its_own_back_as_it_says",
            "virtseal state backup",
        ),
    ),
    (
        "RestoreState",
        Story(
            "told.rs",
            "what_is_lost_of_the_host_is_seen_and_comes_back_as_it_says",
            "virtseal state restore -i FILE",
        ),
    ),
    (
        "RestoreStateOver",
        Story(
            "told.rs",
            "what_is_lost_of_the_host_is_seen_and_comes_back_as_it_says",
            "virtseal state restore --yes-replace",
        ),
    ),
    ("Journal", Booted("journalctl -u virtseald")),
    ("StartDaemon", Booted("systemctl start virtseald")),
    ("StartAll", Booted("systemctl start virtseald.socket virtseald")),
    ("StopAll", Booted("systemctl stop virtseald.socket")),
    ("RestartDaemon", Booted("systemctl restart virtseald")),
    ("ReloadDaemon", Booted("systemctl reload virtseald")),
    ("ShowDaemon", Booted("systemctl status virtseald")),
    ("StartAnew", Booted("systemctl reset-failed virtseald")),
    ("CheckSettings", Booted("virtseald --check")),
    ("RestartLibvirtd", Booted("systemctl restart libvirtd")),
    ("ReloadLibvirtd", Booted("systemctl reload libvirtd")),
    ("ShowLibvirtd", Booted("systemctl status libvirtd")),
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
    (
        "AddProviderHelp",
        Story(
            "key_servers.rs",
            "a_vault_lets_in_and_is_trusted_as_it_says",
            "virtseal provider add transit --help",
        ),
    ),
    (
        "ShowProvider",
        Story(
            "key_servers.rs",
            "a_kms_that_was_given_up_comes_back_as_it_says",
            "virtseal provider show",
        ),
    ),
    (
        "SetUntried",
        Story(
            "key_servers.rs",
            "a_kms_that_was_given_up_comes_back_as_it_says",
            "virtseal provider set kms KEY=VALUE --no-probe",
        ),
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
    (
        "UnlockByFile",
        Story(
            "key_servers.rs",
            "a_vault_lets_in_and_is_trusted_as_it_says",
            "virtseal provider unlock vault --passphrase-file",
        ),
    ),
    (
        "UnlockByPin",
        Story(
            "host_tpm/main.rs",
            "a_pin_is_asked_for_and_signed_kernels_need_no_passphrase",
            "virtseal provider unlock main --tpm",
        ),
    ),
    (
        "LockProvider",
        Story(
            "key_servers.rs",
            "a_token_gets_its_pin_as_it_says",
            "virtseal provider lock",
        ),
    ),
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
        Story(
            "told.rs",
            "a_provider_is_given_up_and_comes_back_as_it_says",
            "virtseal provider restore main",
        ),
    ),
    (
        "AddAgain",
        Story(
            "key_servers.rs",
            "a_kms_that_was_given_up_comes_back_as_it_says",
            "virtseal provider add kmip kms",
        ),
    ),
    (
        "BringBack",
        Story(
            "moves.rs",
            "another_host_adopts_a_vm_from_its_xml",
            "virtseal provider restore main",
        ),
    ),
    (
        "RotateProvider",
        Story(
            "told.rs",
            "a_provider_with_an_older_root_key_gets_its_own_back_as_it_says",
            "virtseal provider rotate",
        ),
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
        Story(
            "told.rs",
            "a_provider_with_an_older_root_key_gets_its_own_back_as_it_says",
            "virtseal provider delete main --force",
        ),
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
    (
        "ListOrphans",
        Story(
            "told.rs",
            "what_is_refused_of_a_volume_is_done_as_it_says",
            "virtseal provider orphans",
        ),
    ),
    (
        "CacheInMemory",
        Story(
            "host_tpm/main.rs",
            "kept_keys_start_vms_after_a_reboot_while_the_kms_is_down",
            "virtseal provider cache",
        ),
    ),
    (
        "CacheOnDisk",
        Story(
            "host_tpm/main.rs",
            "kept_keys_start_vms_after_a_reboot_while_the_kms_is_down",
            "virtseal provider cache kmip-prod 24h --persist tpm",
        ),
    ),
    (
        "EnrollTpm",
        Story(
            "host_tpm/main.rs",
            "tpm_unlocks_at_start_until_the_host_boots_otherwise",
            "virtseal provider tpm main --enroll",
        ),
    ),
    (
        "TrustProvider",
        Story(
            "key_servers.rs",
            "a_kms_and_this_host_trust_each_other_as_it_says",
            "virtseal provider trust",
        ),
    ),
    (
        "TrustCa",
        Story(
            "key_servers.rs",
            "a_kms_and_this_host_trust_each_other_as_it_says",
            "virtseal provider trust kms --ca",
        ),
    ),
    (
        "SetIdentity",
        Story(
            "key_servers.rs",
            "a_kms_and_this_host_trust_each_other_as_it_says",
            "virtseal provider identity",
        ),
    ),
    (
        "EncryptIdentity",
        Story(
            "key_servers.rs",
            "a_kms_and_this_host_trust_each_other_as_it_says",
            "virtseal provider identity kms --cert FILE --encrypt",
        ),
    ),
    (
        "BindIdentity",
        Story(
            "host_tpm/credentials.rs",
            "kmip_key_by_the_tpm",
            "virtseal provider identity",
        ),
    ),
    (
        "RequestCertificate",
        Story(
            "key_servers.rs",
            "a_kms_and_this_host_trust_each_other_as_it_says",
            "virtseal provider csr",
        ),
    ),
    (
        "RequestNewCertificate",
        Story(
            "key_servers.rs",
            "a_kms_and_this_host_trust_each_other_as_it_says",
            "virtseal provider csr kms --new",
        ),
    ),
    (
        "TrustSigner",
        Story(
            "key_servers.rs",
            "a_vault_lets_in_and_is_trusted_as_it_says",
            "put the certificate",
        ),
    ),
    (
        "OtherCertificate",
        Story(
            "key_servers.rs",
            "a_vault_lets_in_and_is_trusted_as_it_says",
            "virtseal provider unlock vault --passphrase-file",
        ),
    ),
    (
        "LogInByCertificate",
        Story(
            "key_servers.rs",
            "a_vault_lets_in_and_is_trusted_as_it_says",
            "let the server ask",
        ),
    ),
    (
        "TransitTrust",
        Story(
            "key_servers.rs",
            "a_vault_lets_in_and_is_trusted_as_it_says",
            "virtseal provider unlock vault --passphrase-file",
        ),
    ),
    (
        "NewPin",
        Story(
            "key_servers.rs",
            "a_token_gets_its_pin_as_it_says",
            "let the token's security officer",
        ),
    ),
    (
        "LogInElsewhere",
        Nobody(
            "SoftHSM, the one token that stories have, never comes to its last try: a unit test of pkcs11/ has one that does",
        ),
    ),
    (
        "UnsealServer",
        Story(
            "key_servers.rs",
            "a_vault_lets_in_and_is_trusted_as_it_says",
            "unseal the server",
        ),
    ),
    (
        "RestoreKek",
        Story(
            "key_servers.rs",
            "a_key_that_is_gone_at_its_server_comes_back_as_it_says",
            "restore that key",
        ),
    ),
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
        Story(
            "formats.rs",
            "a_disk_is_what_its_xml_declares_and_no_header_makes_it_empty",
            "virtseal vm seal --from-format",
        ),
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
    (
        "ShowVm",
        Story(
            "told.rs",
            "of_two_vms_that_had_one_name_each_is_meant_by_its_uuid_as_it_says",
            "virtseal vm status UUID",
        ),
    ),
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
        Story(
            "told.rs",
            "of_two_vms_that_had_one_name_each_is_meant_by_its_uuid_as_it_says",
            "virtseal vm shred UUID",
        ),
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
        Story(
            "snapshot/pivots.rs",
            "a_merge_by_hand_that_libvirtd_died_in_loses_nothing",
            "virtseal vm snapshot delete",
        ),
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
        "ResumeVm",
        Story(
            "volumes.rs",
            "a_disk_grows_where_a_vm_runs_with_its_key",
            "virsh resume",
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
        Story(
            "status.rs",
            "a_saved_vm_and_its_memory_in_plaintext_are_named",
            "virsh restore",
        ),
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
        "ForgetSnapshot",
        Story(
            "strangers.rs",
            "a_vm_of_which_libvirt_does_not_tell_all_hides_no_other",
            "virsh snapshot-delete",
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
        Story(
            "side_doors.rs",
            "copies_and_backups_to_plain_files_are_found_and_to_encrypted_ones_are_not",
            "virsh blockjob --abort",
        ),
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
            Booted(begin) => {
                let follows = ["follows", "follows_and_sees"].map(|by| format!("{by} '{begin}'"));
                let is_taken = follows.iter().any(|line| BOOTED.contains(line));
                assert!(is_taken, "{case}: tests/run-systemd does not follow {begin:?}");
                let says = printed[*case].iter().any(|text| text.starts_with(begin));
                assert!(says, "{case} does not say {begin:?}");
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

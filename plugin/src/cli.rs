//! The command line: a thin client of virtseald.
//!
//! Every step that touches a key runs in the daemon. What happens here is parsing, asking for passphrases,
//! opening files as the caller, and printing.

mod client;
mod job;
mod passphrase;
mod pkcs11;
mod print;
mod provider;
mod transit;
mod trust;
mod volume;

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::api::HostProxy;
use crate::envelope::ProviderId;
use crate::failure::{Code, Failure};
use crate::provider::ScopeSetting;
use crate::provider::cache::{CachePolicy, NothingToCache};
use crate::provider::kmip::{Endpoint, Fingerprint, KmipVersion};
use crate::volume::Bytes;
use client::Client;
use passphrase::{NewPassphraseArgs, PassphraseArgs};
use print::Printer;

/// VM encryption for libvirt hosts.
#[derive(Debug, Parser)]
#[command(
    name = "virtseal",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// The socket of virtseald.
    #[arg(
        long,
        global = true,
        env = "VIRTSEAL_SOCKET",
        default_value = "/run/virtseal/virtseald.sock",
        value_name = "PATH"
    )]
    socket: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Providers, sealed VMs and libvirt at a glance.
    Status,
    /// Key providers.
    #[command(subcommand)]
    Provider(ProviderCommand),
    /// Encrypted disk images.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Sealed VMs.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Sweeps over the envelopes: what runs, what ran, what is behind.
    Jobs {
        #[command(subcommand)]
        command: Option<JobsCommand>,
    },
    /// The audit log.
    #[command(subcommand)]
    Audit(AuditCommand),
}

#[derive(Debug, Subcommand)]
enum JobsCommand {
    /// List the last jobs, and the copies of envelopes that are behind.
    List,
    /// Follow a job, or the one that runs, until it ends.
    Watch {
        /// Its number.
        id: Option<i64>,
    },
    /// End a job, or the one that runs, where it is. What it changed stays.
    Abort {
        /// Its number.
        id: Option<i64>,
    },
}

#[derive(Debug, Subcommand)]
enum RecipientsCommand {
    /// Give every envelope a stanza of this provider.
    Add {
        /// The provider's name.
        name: String,
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Take the stanzas of this provider from every envelope that another one opens.
    Remove {
        /// The provider's name.
        name: String,
        #[command(flatten)]
        watch: WatchArgs,
    },
}

#[derive(Debug, Args)]
struct WatchArgs {
    /// Follow the job until it ends.
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Subcommand)]
enum ProviderCommand {
    /// Add a provider; the first one becomes the default.
    #[command(subcommand)]
    Add(AddCommand),
    /// List all providers.
    List,
    /// Show one provider.
    Show {
        /// Its name.
        name: String,
    },
    /// Change how long the KEKs of a provider are kept for when its servers don't answer.
    Cache {
        /// Its name.
        name: String,
        /// none, until-lock, or a time such as 4h: counted from when each was last fetched.
        policy: CachePolicy,
    },
    /// Make new keys go to this provider.
    Default {
        /// Its name.
        name: String,
    },
    /// Unlock a provider, so that its VMs can start: with its passphrase, PIN, token, secret id or client key.
    Unlock {
        /// Its name.
        name: String,
        /// By the TPM of this host, with which it was enrolled.
        #[arg(long, conflicts_with = "passphrase_source")]
        tpm: bool,
        #[command(flatten)]
        passphrase: PassphraseArgs,
    },
    /// Let the TPM of this host unlock a native provider when virtseald starts, or no longer.
    Tpm(TpmArgs),
    /// Lock a provider: purge its keys from memory, refuse starts.
    Lock {
        /// Its name.
        name: String,
    },
    /// Show this host to a KMS: a client certificate with its private key.
    Identity(IdentityArgs),
    /// Print the signing request for a client certificate whose private key stays on this host.
    Csr(CsrArgs),
    /// Look at the certificates of a KMS, and trust it.
    Trust(TrustArgs),
    /// Write a password-protected backup that `age -d` opens as well.
    Backup(BackupArgs),
    /// Restore a provider from its backup.
    Restore(RestoreArgs),
    /// Retire the keys in use, and rewrap every envelope with new ones.
    Rotate {
        /// Its name.
        name: String,
        #[command(flatten)]
        passphrase: PassphraseArgs,
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Rewrap every envelope for the providers that new ones are for: the default one, or the recipients of the policy.
    Rekey {
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Move envelopes from one provider to another; VMs may run meanwhile.
    Move {
        /// The provider to leave.
        from: String,
        /// The provider to go to.
        to: String,
        /// Only those of this VM: name or UUID.
        #[arg(long)]
        vm: Option<String>,
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Add or remove a provider that can open every envelope.
    #[command(subcommand)]
    Recipients(RecipientsCommand),
    /// Delete a provider that nothing needs.
    Delete {
        /// Its name.
        name: String,
        /// Delete it although VMs need it; asks for its name.
        #[arg(long)]
        force: bool,
        /// The name, typed here instead of at the prompt.
        #[arg(long, value_name = "NAME", requires = "force")]
        yes_delete: Option<String>,
    },
    /// List envelopes and KEKs that no VM uses. Nothing is deleted.
    Orphans,
}

#[derive(Debug, Subcommand)]
enum AddCommand {
    /// The embedded provider: a root key of its own, sealed by a passphrase.
    Native {
        /// Its name.
        name: String,
        #[command(flatten)]
        cache: NoCacheArgs,
        #[command(flatten)]
        passphrase: NewPassphraseArgs,
    },
    /// The transit engine of a HashiCorp Vault or OpenBao. Its KEKs never leave it.
    Transit(Box<TransitArgs>),
    /// A token behind a PKCS#11 module: an HSM, a smart card, SoftHSM. Its KEKs never leave it.
    Pkcs11(Pkcs11Args),
    /// Keys at a key management server that speaks KMIP.
    Kmip(KmipArgs),
}

fn kek_scope() -> impl TypedValueParser<Value = ScopeSetting> {
    PossibleValuesParser::new(["vm", "provider"]).map(|word| match word.as_str() {
        "provider" => ScopeSetting::Provider,
        _ => ScopeSetting::Vm,
    })
}

/// For kinds without a cache, so that who asks for one learns why there is none.
#[derive(Debug, Args)]
struct NoCacheArgs {
    #[arg(long, value_name = "POLICY", hide = true)]
    cache: Option<CachePolicy>,
}

impl NoCacheArgs {
    fn refuse(&self, kind: &str) -> Result<(), Failure> {
        match (self.cache, NothingToCache::of_kind(kind)) {
            (Some(CachePolicy::For(_) | CachePolicy::UntilLock), Some(why)) => {
                Err(Failure::new(Code::Usage, why.to_string()).next("the same command without --cache"))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug, Args)]
struct TransitArgs {
    /// Its name.
    name: String,
    /// The server, or the load balancer of its cluster: https://HOST:PORT.
    #[arg(long, value_name = "URL")]
    address: String,
    /// Where the transit engine is mounted.
    #[arg(long, value_name = "PATH", default_value = "transit")]
    mount: String,
    /// The namespace of engine and login.
    #[arg(long, value_name = "PATH")]
    namespace: Option<String>,
    #[command(flatten)]
    login: TransitLoginArgs,
    /// Whom a key serves: one VM each (vm), or all, with a context for each VM (provider).
    #[arg(long, value_name = "SCOPE", default_value = "vm", value_parser = kek_scope())]
    kek_scope: ScopeSetting,
    /// The name of the shared key.
    #[arg(long, value_name = "NAME")]
    key: Option<String>,
    /// PEM certificates to trust in place of the system's.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The name in the server's certificate, where the address is another.
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    #[command(flatten)]
    cache: NoCacheArgs,
    /// The most time for one operation, in milliseconds.
    #[arg(long, value_name = "N", default_value = "4000")]
    timeout_ms: u32,
    /// The provider's UUID on another host: both open what the other sealed.
    #[arg(long, value_name = "UUID")]
    id: Option<ProviderId>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LoginMethod {
    /// With a token.
    Token,
    /// With a role id and a secret id.
    Approle,
    /// With a client certificate.
    Cert,
}

#[derive(Debug, Args)]
struct TransitLoginArgs {
    /// How to log in; the secret for it is given to `virtseal provider unlock`.
    #[arg(long, value_name = "METHOD", value_enum, default_value = "token")]
    auth: LoginMethod,
    /// The AppRole's id.
    #[arg(long, value_name = "ID", required_if_eq("auth", "approle"))]
    role_id: Option<String>,
    /// The certificate role; any that fits without it.
    #[arg(long, value_name = "NAME")]
    cert_role: Option<String>,
    /// Where the login method is mounted, if not at its usual place.
    #[arg(long, value_name = "PATH")]
    auth_mount: Option<String>,
}

/// As the settings of the kind have it; the daemon reads them.
#[derive(Debug, Args)]
struct KmipArgs {
    /// Its name.
    name: String,
    /// A server of the KMS; repeat it for the other nodes of the same cluster, in the order to ask them.
    #[arg(long = "endpoint", value_name = "HOST[:PORT]", required = true)]
    endpoints: Vec<Endpoint>,
    /// Where keys do their work: fetched and used on this host, or never leaving the server.
    #[arg(long, value_parser = ["local", "server"], default_value = "local")]
    mode: String,
    /// Whom one key serves.
    #[arg(long, value_parser = kek_scope(), default_value = "vm")]
    kek_scope: ScopeSetting,
    /// How long a fetched key is kept for when no server answers: none, until-lock, or a time such as 4h [default: 24h].
    #[arg(long, value_name = "POLICY")]
    cache: Option<CachePolicy>,
    /// Speak this version instead of the best that both sides have.
    #[arg(long, value_name = "1.1 … 2.1")]
    kmip_version: Option<KmipVersion>,
    /// The most time for one operation with its retries, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 4500)]
    timeout_ms: u64,
    /// The provider's UUID on another host: both open what the other sealed.
    #[arg(long, value_name = "UUID")]
    id: Option<ProviderId>,
}

#[derive(Debug, Args)]
struct TpmArgs {
    /// The provider's name.
    name: String,
    /// Seal its root keys to the TPM; it must be unlocked. Its passphrase goes on unlocking it too.
    #[arg(long, required_unless_present = "remove", conflicts_with = "remove")]
    enroll: bool,
    /// Only while these PCRs are what they are now: PCR 7, unless given, is Secure Boot's state and keys.
    #[arg(long, value_name = "LIST", requires = "enroll")]
    pcrs: Option<String>,
    /// Take that way in away again.
    #[arg(long)]
    remove: bool,
}

#[derive(Debug, Args)]
struct IdentityArgs {
    /// The provider's name.
    name: String,
    /// The client's certificate in PEM, then those that signed it; - is standard input.
    #[arg(long, value_name = "FILE")]
    cert: PathBuf,
    /// Its private key in PEM; not needed if it is in the same file or belongs to the last `provider csr`.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// A user name, for a KMS that asks for more than a certificate.
    #[arg(long, value_name = "NAME", requires = "password_file")]
    user: Option<String>,
    /// Read that user's password from this file.
    #[arg(long, value_name = "FILE", requires = "user")]
    password_file: Option<PathBuf>,
    /// Seal the private key by a passphrase: the provider is locked then until it is unlocked.
    #[arg(long)]
    seal: bool,
    #[command(flatten)]
    passphrase: NewPassphraseArgs,
}

#[derive(Debug, Args)]
struct CsrArgs {
    /// The provider's name.
    name: String,
    /// Make a new private key and request, in place of the one that waits.
    #[arg(long)]
    new: bool,
    /// An RSA key of 3072 bits instead of a NIST P-256 one.
    #[arg(long, requires = "new")]
    rsa: bool,
    /// The common name to ask for instead of the host's name; many a KMS takes it for the user's name.
    #[arg(long, value_name = "NAME", requires = "new")]
    common_name: Option<String>,
    /// Write it to this file.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct TrustArgs {
    /// The provider's name.
    name: String,
    /// Trust servers whose certificate was signed by a CA in this PEM file and bears the endpoint's name.
    #[arg(long, value_name = "FILE", group = "known_by")]
    ca: Option<PathBuf>,
    /// Refuse certificates that this revocation list of the CA (PEM) names. Renew it before it runs out.
    #[arg(long, value_name = "FILE", requires = "ca")]
    crl: Option<PathBuf>,
    /// Trust a server with this SHA-256 fingerprint; repeat it for every node.
    #[arg(long = "fingerprint", value_name = "HEX", group = "known_by")]
    fingerprints: Vec<Fingerprint>,
    /// Do not ask.
    #[arg(long, requires = "known_by")]
    yes: bool,
}

#[derive(Debug, Args)]
struct Pkcs11Args {
    /// Its name.
    name: String,
    /// The module: a shared library that only root can change.
    #[arg(long, value_name = "PATH")]
    module: PathBuf,
    #[command(flatten)]
    token: TokenArgs,
    /// The size of new KEKs: 128, 192 or 256.
    #[arg(long, value_name = "BITS", default_value = "256")]
    key_bits: u32,
    /// Whom a KEK serves: one for all VMs (provider), or one for each (vm).
    #[arg(long, value_name = "SCOPE", default_value = "provider", value_parser = kek_scope())]
    kek_scope: ScopeSetting,
    #[command(flatten)]
    cache: NoCacheArgs,
    /// The string that the module wants for C_Initialize, where it wants one (NSS).
    #[arg(long, value_name = "TEXT")]
    init_args: Option<String>,
    /// The provider's UUID on other hosts, where the token holds KEKs of several.
    #[arg(long, value_name = "UUID")]
    id: Option<ProviderId>,
    /// The PIN.
    #[command(flatten)]
    pin: PassphraseArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct TokenArgs {
    /// The token with this label.
    #[arg(long, value_name = "LABEL")]
    token_label: Option<String>,
    /// The token with this serial number.
    #[arg(long, value_name = "SERIAL")]
    token_serial: Option<String>,
    /// The token in the slot of this number.
    #[arg(long, value_name = "NUMBER")]
    slot: Option<u64>,
}

#[derive(Debug, Args)]
struct BackupArgs {
    /// The provider's name.
    name: String,
    /// Where to write the backup; must not exist.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Write the root key in the clear: whoever reads the file has every key.
    #[arg(long, conflicts_with_all = ["passphrase_file", "passphrase_fd", "passphrase_credential"])]
    no_passphrase: bool,
    #[command(flatten)]
    passphrase: NewPassphraseArgs,
}

#[derive(Debug, Args)]
struct RestoreArgs {
    /// What to call the provider here.
    name: String,
    /// The backup.
    #[arg(long, short, value_name = "FILE")]
    input: PathBuf,
    /// The backup was made with --no-passphrase.
    #[arg(long, conflicts_with_all = ["backup_passphrase_file", "backup_passphrase_fd"])]
    no_backup_passphrase: bool,
    /// Read the backup's passphrase from this file; - is standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "backup_passphrase_fd")]
    backup_passphrase_file: Option<PathBuf>,
    /// Read the backup's passphrase from this file descriptor.
    #[arg(long, value_name = "N")]
    backup_passphrase_fd: Option<i32>,
    #[command(flatten)]
    passphrase: NewPassphraseArgs,
}

#[derive(Debug, Subcommand)]
enum VolumeCommand {
    /// Create an encrypted qcow2 image.
    Create(CreateArgs),
    /// Show header, keyslots and envelope of an image; needs no key and no daemon.
    Info {
        /// The image.
        path: PathBuf,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Where to create it.
    path: PathBuf,
    /// Virtual size: bytes, or with K, M, G, T (powers of 1024).
    #[arg(long, required_unless_present_any = ["from", "backing"])]
    size: Option<Bytes>,
    /// The VM that the image is for: name or UUID.
    #[arg(long)]
    vm: String,
    /// qcow2 cluster size.
    #[arg(long, value_name = "SIZE")]
    cluster_size: Option<Bytes>,
    /// Put the image on top of this one.
    #[arg(long, value_name = "IMAGE", conflicts_with = "from")]
    backing: Option<PathBuf>,
    /// Format of the backing image.
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<String>,
    /// Fill it from this raw or qcow2 image; it grows to --size.
    #[arg(long, value_name = "IMAGE")]
    from: Option<PathBuf>,
    /// Use this provider instead of the default one.
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
}

#[derive(Debug, Subcommand)]
enum VmCommand {
    /// Seal a defined, stopped UEFI VM: its disks, its vTPM, its UEFI variables.
    Seal {
        /// The VM: name or UUID.
        vm: String,
        /// Use this provider instead of the default one.
        #[arg(long, value_name = "NAME")]
        provider: Option<String>,
        /// Print what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Make a VM plain again that has not run since it was sealed.
    Unseal {
        /// The VM: name or UUID.
        vm: String,
        /// Print what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Rewrap the keys of one VM for the providers that new ones are for.
    Rekey {
        /// The VM: name or UUID.
        vm: String,
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Destroy all keys of a VM that is off: nothing opens its disks again. Prints a receipt.
    Shred {
        /// The VM: name or UUID.
        vm: String,
        /// The VM's name, typed here instead of at the prompt.
        #[arg(long, value_name = "NAME")]
        yes_shred: Option<String>,
    },
    /// Show the objects of a VM, or of all sealed VMs.
    Status {
        /// The VM: name or UUID.
        vm: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// Print the last records.
    Show {
        /// How many.
        #[arg(long, short = 'n', default_value_t = 20)]
        records: u32,
    },
    /// Check that no record was changed, removed or reordered.
    Verify,
}

impl Cli {
    /// Does what was asked.
    ///
    /// # Errors
    /// What the user should be told, with the exit code.
    pub async fn run(self) -> Result<(), Failure> {
        let printer = Printer::new(self.json);
        if let Command::Volume(VolumeCommand::Info { path }) = &self.command {
            return volume::info(path, &printer);
        }
        let mut client = Client::connect(&self.socket).await?;
        match self.command {
            Command::Status => printer.status(&client.call(async |host| host.status().await).await?),
            Command::Provider(command) => provider::run(command, &mut client, &printer).await,
            Command::Volume(VolumeCommand::Create(args)) => {
                volume::create(&args, &mut client, &printer).await
            }
            Command::Volume(VolumeCommand::Info { path }) => volume::info(&path, &printer),
            Command::Vm(command) => vm(command, &mut client, &printer).await,
            Command::Jobs { command } => job::run(command, &mut client, &printer).await,
            Command::Audit(command) => audit(command, &mut client, &printer).await,
        }
    }
}

async fn vm(command: VmCommand, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    match command {
        VmCommand::Seal {
            vm,
            provider,
            dry_run,
        } => {
            let outcome = client
                .call(async |host| host.seal_vm(&vm, provider.as_deref(), dry_run).await)
                .await?;
            printer.outcome(&outcome, dry_run)?;
            warn_of_providers(client, printer).await
        }
        VmCommand::Unseal { vm, dry_run } => {
            let outcome = client
                .call(async |host| host.unseal_vm(&vm, dry_run).await)
                .await?;
            printer.outcome(&outcome, dry_run)
        }
        VmCommand::Rekey { vm, watch } => {
            let request = job::request("rekey", None, None, Some(vm));
            job::start(&request, &watch, client, printer).await
        }
        VmCommand::Shred { vm, yes_shred } => {
            let typed = job::typed(
                yes_shred,
                &format!("All keys of {vm} will be destroyed. Type its name: "),
            )?;
            let receipt = client
                .call(async |host| host.shred_vm(&vm, Some(&typed)).await)
                .await?;
            printer.receipt(&receipt)
        }
        VmCommand::Status { vm } => {
            let shown = client
                .call(async |host| host.vm_status(vm.as_deref()).await)
                .await?;
            printer.vms(&shown.vms)?;
            warn_of_providers(client, printer).await
        }
    }
}

/// Says what is about to go wrong with them.
async fn warn_of_providers(client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let known = client.call(async |host| host.list_providers().await).await?;
    printer.warnings(&known.providers);
    Ok(())
}

async fn audit(command: AuditCommand, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    match command {
        AuditCommand::Show { records } => printer.audit(
            &client
                .call(async |host| host.show_audit(records.into()).await)
                .await?,
        ),
        AuditCommand::Verify => {
            printer.audit_verified(&client.call(async |host| host.verify_audit().await).await?)
        }
    }
}

//! A PKCS#11 module and the one thread that calls it.
//!
//! A module may hang in a driver or a network that nothing can interrupt, and a process may initialize it only once.
//! So each module has a thread for as long as the process lives, which owns the context and every session; callers
//! wait at its queue, and never longer than their deadline. A call whose caller has given up is not made any more.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use openssl::sha::Sha256;

use super::error::TokenError;
use super::login::{Login, LoginNumber};
use super::settings::Pkcs11Settings;
use super::token::Token;
use crate::model::deadlines::pkcs11::{LAST_CALLS, LAST_CALLS_LOOK, RESET};
use crate::provider::{PinRefusal, ProviderError};
use crate::secret::SecretBytes;

/// Modules that were loaded; never unloaded, for many do not survive that.
static LOADED: Mutex<BTreeMap<PathBuf, Arc<Module>>> = Mutex::new(BTreeMap::new());

/// The callers' side of a module's thread.
pub(super) struct Module {
    path: PathBuf,
    init_args: Option<String>,
    jobs: Sender<Job>,
    /// When the call began that the thread is in.
    busy: Arc<Mutex<Option<Instant>>>,
    /// Held by the thread while it is in a call.
    gate: Arc<Mutex<Gate>>,
}

/// Whether the module may be called.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    /// The process is exiting: the module's own exit handlers take apart what a call would use.
    Closed,
}

struct Job {
    expires: Option<Instant>,
    run: Box<dyn FnOnce(&mut Worker) + Send>,
}

impl Module {
    /// The module of `settings`, with its thread; nothing is loaded before the first call.
    pub(super) fn of(settings: &Pkcs11Settings) -> Result<Arc<Self>, TokenError> {
        // Two names of one file are one module, which must not be initialized twice.
        let path = settings.module.canonicalize().unwrap_or(settings.module.clone());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = loaded.get(&path) {
            if module.init_args != settings.init_args {
                return Err(TokenError::OtherInitArgs(path));
            }
            return Ok(Arc::clone(module));
        }
        let module = Self::start(path.clone(), settings.init_args.clone())?;
        loaded.insert(path, Arc::clone(&module));
        Ok(module)
    }

    fn start(path: PathBuf, init_args: Option<String>) -> Result<Arc<Self>, TokenError> {
        let (jobs, queue) = channel();
        let busy = Arc::new(Mutex::new(None));
        let worker = Worker {
            path: path.clone(),
            init_args: init_args.clone(),
            context: None,
            initialized: false,
            tokens: HashMap::new(),
            last_reset: None,
            refused: HashSet::new(),
            salt: SecretBytes::random(32).map_err(TokenError::Memory)?,
        };
        let gate = Arc::new(Mutex::new(Gate::Open));
        let (marks, passes) = (Arc::clone(&busy), Arc::clone(&gate));
        std::thread::Builder::new()
            .name("pkcs11".to_owned())
            .spawn(move || worker.serve(&queue, &marks, &passes))
            .map_err(TokenError::Thread)?;
        Ok(Arc::new(Self {
            path,
            init_args,
            jobs,
            busy,
            gate,
        }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What `work` returns, unless that takes longer than `deadline`, the time in the queue included.
    pub(super) fn call<T: Send + 'static>(
        &self,
        deadline: Duration,
        work: impl FnOnce(&mut Worker) -> Result<T, TokenError> + Send + 'static,
    ) -> Result<T, TokenError> {
        if let Some(silent) = self.silent_for(deadline) {
            return Err(TokenError::Silent(silent));
        }
        let (sender, answer) = sync_channel(1);
        let run = Box::new(move |worker: &mut Worker| {
            // Nobody waits any more when this fails.
            let _ = sender.send(work(worker));
        });
        let expires = Some(Instant::now() + deadline);
        let gone = |_| TokenError::Thread(std::io::Error::other("the thread of the module has ended"));
        self.jobs.send(Job { expires, run }).map_err(gone)?;
        match answer.recv_timeout(deadline) {
            Ok(answer) => answer,
            Err(_) => Err(TokenError::Silent(deadline)),
        }
    }

    /// Lets `work` be done, however late.
    pub(super) fn post(&self, work: impl FnOnce(&mut Worker) + Send + 'static) {
        let run = Box::new(work);
        // Fails only when the thread has ended, and its sessions with it.
        let _ = self.jobs.send(Job { expires: None, run });
    }

    /// For how long the module has been in one call, if that is longer than `patience`.
    pub(super) fn silent_for(&self, patience: Duration) -> Option<Duration> {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.map(|since| since.elapsed()).filter(|time| *time > patience)
    }
}

fn load_failure(error: &Error) -> String {
    match error {
        Error::LibraryLoading(why) => why.to_string(),
        error => error.to_string(),
    }
}

/// Lets no call into a module begin any more, and those that are in one end, if they do so in time.
extern "C" fn close_gates() {
    let until = Instant::now() + LAST_CALLS;
    let modules: Vec<_> = match LOADED.try_lock() {
        Ok(loaded) => loaded.values().cloned().collect(),
        Err(_) => return,
    };
    for module in modules {
        loop {
            match module.gate.try_lock() {
                Ok(mut gate) => *gate = Gate::Closed,
                Err(TryLockError::Poisoned(gate)) => *gate.into_inner() = Gate::Closed,
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    std::thread::sleep(LAST_CALLS_LOOK);
                    continue;
                }
                Err(TryLockError::WouldBlock) => {}
            }
            break;
        }
    }
}

/// The thread's side: the context, and a session per provider.
pub(super) struct Worker {
    path: PathBuf,
    init_args: Option<String>,
    /// Loaded once. Kept also while it can't be initialized, as when the service behind it is not up.
    context: Option<Pkcs11>,
    initialized: bool,
    tokens: HashMap<LoginNumber, Token>,
    last_reset: Option<Instant>,
    /// Digests of PINs that a token refused. Never sent again: a token counts wrong PINs, and blocks itself.
    refused: HashSet<[u8; 32]>,
    /// Makes these digests worthless elsewhere.
    salt: SecretBytes,
}

impl Worker {
    fn serve(mut self, queue: &Receiver<Job>, busy: &Mutex<Option<Instant>>, gate: &Mutex<Gate>) {
        let mark = |at| *busy.lock().unwrap_or_else(PoisonError::into_inner) = at;
        while let Ok(job) = queue.recv() {
            let gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
            if *gate == Gate::Closed {
                // Not even its memory is given back: a session would be closed with it.
                std::mem::forget(self);
                return;
            }
            mark(Some(Instant::now()));
            if job.expires.is_none_or(|end| end > Instant::now()) {
                (job.run)(&mut self);
            }
            mark(None);
        }
    }

    /// Does `op` with the token of `login`. When the token went away, and maybe came back, it is tried with a new
    /// session, and then with a module initialized anew.
    pub(super) fn with_token<T>(
        &mut self,
        login: &Arc<Login>,
        mut op: impl FnMut(&mut Token) -> Result<T, TokenError>,
    ) -> Result<T, TokenError> {
        let had_session = self.tokens.contains_key(&login.number);
        let mut done = self.attempt(login, &mut op);
        if had_session && done.as_ref().is_err_and(TokenError::is_loss) {
            done = self.attempt(login, &mut op);
        }
        if done.as_ref().is_err_and(TokenError::is_loss) && self.may_reset() {
            self.reset();
            done = self.attempt(login, &mut op);
        }
        done
    }

    fn attempt<T>(
        &mut self,
        login: &Arc<Login>,
        op: impl FnOnce(&mut Token) -> Result<T, TokenError>,
    ) -> Result<T, TokenError> {
        let done = self.ready(login).and_then(op);
        if done.as_ref().is_err_and(TokenError::is_loss) {
            self.tokens.remove(&login.number);
        }
        done
    }

    fn ready(&mut self, login: &Arc<Login>) -> Result<&mut Token, TokenError> {
        let pin = login.pin().ok_or(ProviderError::Locked)?;
        if !self.tokens.contains_key(&login.number) {
            let token = self.open(login)?;
            self.log_in(login, &token, &pin)?;
            self.keep(login, token);
        }
        Ok(self
            .tokens
            .get_mut(&login.number)
            .expect("it was there, or was just put there"))
    }

    /// Presents `pin` to `token`, unless this token has refused it before. What it refuses, `login` forgets.
    fn log_in(&mut self, login: &Login, token: &Token, pin: &SecretBytes) -> Result<(), TokenError> {
        let mut digest = Sha256::new();
        digest.update(self.salt.expose());
        digest.update(token.name().as_bytes());
        digest.update(&[0]);
        digest.update(pin.expose());
        let digest = digest.finish();
        let done = match self.refused.contains(&digest) {
            true => Err(TokenError::Pin(PinRefusal::KnownToBeWrong)),
            false => token.login(pin),
        };
        done.inspect_err(|error| {
            if matches!(error, TokenError::Pin(_)) {
                self.refused.insert(digest);
            }
            login.forget_refused(pin, error);
        })
    }

    /// A new session with the token of `login`, logged in with `pin`.
    pub(super) fn connect(&mut self, login: &Arc<Login>, pin: &SecretBytes) -> Result<Token, TokenError> {
        let token = self.reopen(login)?;
        self.log_in(login, &token, pin)?;
        Ok(token)
    }

    /// The slot that the token of `login` is in; needs no PIN.
    pub(super) fn find(&mut self, login: &Arc<Login>) -> Result<u64, TokenError> {
        Ok(self.reopen(login)?.slot())
    }

    fn reopen(&mut self, login: &Arc<Login>) -> Result<Token, TokenError> {
        let opened = self.open(login);
        if opened.as_ref().is_err_and(TokenError::is_loss) && self.may_reset() {
            self.reset();
            return self.open(login);
        }
        opened
    }

    fn open(&mut self, login: &Arc<Login>) -> Result<Token, TokenError> {
        self.context().and_then(|context| Token::open(context, login))
    }

    /// Keeps the session of `login`, logged in.
    pub(super) fn keep(&mut self, login: &Arc<Login>, token: Token) {
        self.tokens.insert(login.number, token);
    }

    /// Logs out, and forgets the session.
    pub(super) fn close(&mut self, login: LoginNumber) {
        if let Some(token) = self.tokens.remove(&login) {
            token.logout();
        }
    }

    fn context(&mut self) -> Result<&Pkcs11, TokenError> {
        if self.context.is_none() {
            let context = Pkcs11::new(&self.path).map_err(|error| TokenError::Load(load_failure(&error)))?;
            // SAFETY: `close_gates` is a plain function that lives as long as the process. Exit handlers run in reverse
            // order, so it runs before those of the module that was just loaded.
            unsafe { libc::atexit(close_gates) };
            self.context = Some(context);
        }
        let context = self.context.as_ref().expect("it was just loaded");
        if !self.initialized {
            self.initialize(context)?;
            self.initialized = true;
        }
        Ok(context)
    }

    fn initialize(&self, context: &Pkcs11) -> Result<(), TokenError> {
        let reserved = match &self.init_args {
            None => None,
            Some(args) => Some(CString::new(args.as_str()).map_err(|_| TokenError::InitArgs)?),
        };
        let flags = CInitializeFlags::OS_LOCKING_OK;
        let args = match reserved
            .as_ref()
            .and_then(|text| NonNull::new(text.as_ptr().cast_mut()))
        {
            None => CInitializeArgs::new(flags),
            // SAFETY: `reserved` is a C string that outlives the call; a module that wants such a string (NSS) reads
            // it during C_Initialize only. That the module is one of these is the admin's word, as the module itself.
            Some(text) => unsafe { CInitializeArgs::new_with_reserved(flags, text.cast()) },
        };
        match context.initialize(args) {
            // Another library of this process uses it as well.
            Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Some modules look for tokens only when they are initialized. That ends the sessions of the others, which log in
    /// again by themselves, so it is not done for them all the time.
    fn may_reset(&self) -> bool {
        self.tokens.is_empty() || self.last_reset.is_none_or(|last| last.elapsed() > RESET)
    }

    #[cfg(test)]
    pub(super) fn allow_reset(&mut self) {
        self.last_reset = None;
    }

    fn reset(&mut self) {
        self.tokens.clear();
        self.last_reset = Some(Instant::now());
        if let Some(context) = &self.context {
            // A module that lost its device may refuse; then it refuses what follows as well, with a better reason.
            let _ = context.clone().finalize();
            self.initialized = self.initialize(context).is_ok();
        }
    }
}

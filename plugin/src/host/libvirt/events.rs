//! What libvirt tells by itself of running VMs: devices that came, jobs that began and ended.
//!
//! libvirt calls back on the thread that [`start_loop`] begins, which must not wait for anything: what is heard is handed on. `virt` has no
//! binding for this, so it is `virt::sys` here. That a block job or a backup begins is told by QEMU alone, through libvirt.

use std::ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_void};
use std::mem;
use std::sync::Arc;

use virt::connect::Connect;
use virt::error::Error;
use virt::{event, sys};

use crate::model::deadlines::libvirt::EVENTS_FAILED;
use crate::model::envelope::VmId;

/// Something happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    pub vm: VmId,
    pub name: String,
    pub change: Change,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It may have another device, or a job: its XML tells.
    Any,
    /// It runs, and did not before.
    Started,
    /// The copy of this disk has ended, one way or another.
    CopyEnded(String),
    /// A backup has ended, one way or another.
    BackupEnded,
    /// Its memory was written to a file, as `virsh save` or `virsh dump` do.
    MemoryWritten(MemoryFile),
}

/// Who has written the memory of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum MemoryFile {
    /// `virsh save`, `virsh managedsave`.
    Save,
    /// `virsh dump`.
    Dump,
    /// `virsh snapshot-create-as --memspec`.
    Snapshot,
}

/// What QEMU tells of: <https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html>.
const OF_QEMU: &CStr = c"^(JOB_STATUS_CHANGE|DUMP_COMPLETED)$";

pub(crate) type Listener = Arc<dyn Fn(Heard) + Send + Sync>;

/// Makes libvirt able to tell anything on connections that are opened from now on. Each call on one of those wakes the loop's thread
/// too, so connections that starts wait for are opened before.
pub(crate) fn start_loop() -> Result<(), String> {
    event::event_register_default_impl().map_err(|error| error.message().to_owned())?;
    let thread = std::thread::Builder::new().name("events".to_owned());
    thread
        .spawn(run_loop)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Waits for libvirt, for ever.
fn run_loop() {
    loop {
        if let Err(error) = event::event_run_default_impl() {
            tracing::error!("libvirt's events can't be waited for: {}", error.message());
            std::thread::sleep(EVENTS_FAILED);
        }
    }
}

/// As long as it lives, the listener is told.
#[derive(Debug)]
pub(crate) struct Listening {
    connection: Connect,
    events: Vec<c_int>,
    of_qemu: Option<c_int>,
}

impl Listening {
    /// Whether the connection stands; on a dead one nothing will be heard.
    pub(crate) fn is_alive(&self) -> bool {
        self.connection.is_alive().unwrap_or(false)
    }

    /// Whether the beginning of a job is told too.
    pub(crate) fn hears_beginnings(&self) -> bool {
        self.of_qemu.is_some()
    }

    pub(super) fn begin(connection: Connect, listener: &Listener) -> Result<Self, Error> {
        let mut listening = Self {
            connection,
            events: Vec::new(),
            of_qemu: None,
        };
        listening.register(sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle(), listener)?;
        listening.register(sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, block_job(), listener)?;
        listening.register(sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, device(), listener)?;
        listening.register(sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, device(), listener)?;
        listening.register(sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, job(), listener)?;
        let opaque = boxed(listener);
        // SAFETY: the connection lives as long as `listening`; `opaque` is a `Listener` in a box, which `free` takes back, and which
        // `of_qemu` takes it for; libvirt copies the pattern.
        let id = unsafe {
            sys::virConnectDomainQemuMonitorEventRegister(
                listening.connection.as_ptr(),
                std::ptr::null_mut(),
                OF_QEMU.as_ptr(),
                Some(of_qemu),
                opaque,
                Some(free),
                sys::VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX,
            )
        };
        // A libvirt that refuses this tells the ends of jobs all the same.
        listening.of_qemu = (id >= 0).then_some(id);
        if id < 0 {
            // SAFETY: libvirt has refused it, so it is still ours, and nobody else has it.
            unsafe { free(opaque) };
        }
        Ok(listening)
    }

    fn register(
        &mut self,
        event: sys::virDomainEventID,
        callback: sys::virConnectDomainEventGenericCallback,
        listener: &Listener,
    ) -> Result<(), Error> {
        let event = c_int::try_from(event).expect("libvirt has few events");
        let opaque = boxed(listener);
        // SAFETY: as in `begin`; `callback` is the one whose arguments this event has.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                self.connection.as_ptr(),
                std::ptr::null_mut(),
                event,
                callback,
                opaque,
                Some(free),
            )
        };
        if id < 0 {
            let error = Error::last_error();
            // SAFETY: libvirt has refused it, so it is still ours, and nobody else has it.
            unsafe { free(opaque) };
            return Err(error);
        }
        self.events.push(id);
        Ok(())
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        for id in self.events.drain(..) {
            // SAFETY: the connection lives, and the id is one that it gave. That it may be dead is no matter.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connection.as_ptr(), id) };
        }
        if let Some(id) = self.of_qemu.take() {
            // SAFETY: the same.
            unsafe { sys::virConnectDomainQemuMonitorEventDeregister(self.connection.as_ptr(), id) };
        }
    }
}

fn boxed(listener: &Listener) -> *mut c_void {
    Box::into_raw(Box::new(Arc::clone(listener))).cast()
}

unsafe extern "C" fn free(opaque: *mut c_void) {
    // SAFETY: `boxed` has made it, and whoever calls this has no use for it any more.
    drop(unsafe { Box::from_raw(opaque.cast::<Listener>()) });
}

/// # Safety
/// `domain` lives until the call is over, `opaque` was made by [`boxed`] and is not freed meanwhile.
unsafe fn tell(domain: sys::virDomainPtr, opaque: *mut c_void, change: Change) {
    let mut uuid = [0; 16];
    // SAFETY: the domain lives, and the array has the 16 bytes that libvirt writes.
    if unsafe { sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) } < 0 {
        return;
    }
    // SAFETY: the domain lives, and with it its name, which ends with a zero.
    let name = unsafe { text(sys::virDomainGetName(domain)) };
    // SAFETY: by the contract of this function.
    let listener = unsafe { &*opaque.cast::<Listener>() };
    listener(Heard {
        vm: VmId(uuid::Uuid::from_bytes(uuid)),
        name: name.unwrap_or_default(),
        change,
    });
}

/// # Safety
/// It is null, or text that ends with a zero.
unsafe fn text(pointer: *const c_char) -> Option<String> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: by the contract of this function.
    Some(unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned())
}

fn lifecycle() -> sys::virConnectDomainEventGenericCallback {
    unsafe extern "C" fn heard(
        _: sys::virConnectPtr,
        domain: sys::virDomainPtr,
        event: c_int,
        detail: c_int,
        opaque: *mut c_void,
    ) -> c_int {
        let is = |number: c_int, named: c_uint| u32::try_from(number) == Ok(named);
        let saved =
            is(event, sys::VIR_DOMAIN_EVENT_STOPPED) && is(detail, sys::VIR_DOMAIN_EVENT_STOPPED_SAVED);
        let change = if saved {
            Change::MemoryWritten(MemoryFile::Save)
        } else if is(event, sys::VIR_DOMAIN_EVENT_STARTED) {
            Change::Started
        } else {
            Change::Any
        };
        // SAFETY: libvirt keeps both until the call is over.
        unsafe { tell(domain, opaque, change) };
        0
    }
    let callback: unsafe extern "C" fn(_, _, _, _, _) -> _ = heard;
    // SAFETY: libvirt calls it with the arguments of a lifecycle event; its own VIR_DOMAIN_EVENT_CALLBACK does the same.
    unsafe { mem::transmute::<sys::virConnectDomainEventCallback, _>(Some(callback)) }
}

fn block_job() -> sys::virConnectDomainEventGenericCallback {
    unsafe extern "C" fn heard(
        _: sys::virConnectPtr,
        domain: sys::virDomainPtr,
        disk: *const c_char,
        kind: c_int,
        status: c_int,
        opaque: *mut c_void,
    ) {
        let is = |number: c_int, named: c_uint| u32::try_from(number) == Ok(named);
        // SAFETY: libvirt gives the target of the disk, as text that ends with a zero.
        let disk = unsafe { text(disk) };
        let copy = is(kind, sys::VIR_DOMAIN_BLOCK_JOB_TYPE_COPY);
        let change = match disk.filter(|_| copy && !is(status, sys::VIR_DOMAIN_BLOCK_JOB_READY)) {
            Some(disk) => Change::CopyEnded(disk),
            None => Change::Any,
        };
        // SAFETY: libvirt keeps both until the call is over.
        unsafe { tell(domain, opaque, change) };
    }
    let callback: unsafe extern "C" fn(_, _, _, _, _, _) = heard;
    // SAFETY: libvirt calls it with the arguments of a block job's event.
    unsafe { mem::transmute::<sys::virConnectDomainEventBlockJobCallback, _>(Some(callback)) }
}

fn device() -> sys::virConnectDomainEventGenericCallback {
    unsafe extern "C" fn heard(
        _: sys::virConnectPtr,
        domain: sys::virDomainPtr,
        _alias: *const c_char,
        opaque: *mut c_void,
    ) {
        // SAFETY: libvirt keeps both until the call is over.
        unsafe { tell(domain, opaque, Change::Any) };
    }
    let callback: unsafe extern "C" fn(_, _, _, _) = heard;
    // SAFETY: libvirt calls it with the arguments of a device's event, which are the same when one is added and removed.
    unsafe { mem::transmute::<sys::virConnectDomainEventDeviceAddedCallback, _>(Some(callback)) }
}

fn job() -> sys::virConnectDomainEventGenericCallback {
    unsafe extern "C" fn heard(
        _: sys::virConnectPtr,
        domain: sys::virDomainPtr,
        parameters: sys::virTypedParameterPtr,
        count: c_int,
        opaque: *mut c_void,
    ) {
        let mut operation = 0;
        // SAFETY: libvirt gives that many parameters; the number outlives the call, which writes it.
        let found = unsafe {
            sys::virTypedParamsGetInt(
                parameters,
                count,
                sys::VIR_DOMAIN_JOB_OPERATION.as_ptr(),
                &raw mut operation,
            )
        };
        let operation = u32::try_from(operation).unwrap_or(sys::VIR_DOMAIN_JOB_OPERATION_UNKNOWN);
        let change = match operation {
            _ if found <= 0 => Change::Any,
            sys::VIR_DOMAIN_JOB_OPERATION_BACKUP => Change::BackupEnded,
            sys::VIR_DOMAIN_JOB_OPERATION_SAVE => Change::MemoryWritten(MemoryFile::Save),
            sys::VIR_DOMAIN_JOB_OPERATION_DUMP => Change::MemoryWritten(MemoryFile::Dump),
            sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT => Change::MemoryWritten(MemoryFile::Snapshot),
            _ => Change::Any,
        };
        // SAFETY: libvirt keeps both until the call is over.
        unsafe { tell(domain, opaque, change) };
    }
    let callback: unsafe extern "C" fn(_, _, _, _, _) = heard;
    // SAFETY: libvirt calls it with the arguments of a completed job's event.
    unsafe { mem::transmute::<sys::virConnectDomainEventJobCompletedCallback, _>(Some(callback)) }
}

unsafe extern "C" fn of_qemu(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: *const c_char,
    _seconds: c_longlong,
    _micros: c_uint,
    _details: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt gives the name of the event, as text that ends with a zero.
    let change = match unsafe { text(event) }.as_deref() {
        Some("DUMP_COMPLETED") => Change::MemoryWritten(MemoryFile::Dump),
        _ => Change::Any,
    };
    // SAFETY: libvirt keeps both until the call is over.
    unsafe { tell(domain, opaque, change) };
}

//! What agent, helper and guard say to each other: one message a packet, over a Unix socket of type SEQPACKET.
//!
//! A packet is a byte that says what it is, a few numbers, and descriptors. What can be long comes as a file in memory.
//! [`send`] and [`receive`] use the stack only, so that they can be called while file systems are frozen.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::clock::{Instant, slice};

/// Of these messages. After an upgrade a helper of the old version may serve an agent of the new one.
pub(crate) const VERSION: u64 = 1;
/// SCM_MAX_FD of the kernel.
const MAX_FILES: usize = 253;
const MAX_BYTES: usize = 32;

/// What a packet is. Those with a number have it behind this byte, little-endian.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Tag {
    /// Helper: ready, in this [`VERSION`].
    Hello = b'h',
    /// Agent: find what is on these devices. Helper: found.
    Find = b'f',
    /// Agent: prepare to freeze what was found. Helper: the journal and the superblocks.
    Prepare = b'p',
    /// Agent: sync within so many nanoseconds. Helper: done.
    Sync = b's',
    /// Agent: freeze for so many nanoseconds at most. Helper: all is frozen. To the guard: until then.
    Freeze = b'z',
    /// Agent: thaw. Helper: an [`Answer`].
    Thaw = b't',
    /// Agent: no more freezing of what was prepared. To the guard: nothing is frozen.
    Done = b'u',
    /// Helper: it failed, an [`Answer`].
    Failed = b'!',
    /// Helper to guard: something is in the kernel still, do not thaw it.
    Wait = b'w',
}

impl Tag {
    fn from_byte(byte: u8) -> Option<Self> {
        use Tag::*;
        [Hello, Find, Prepare, Sync, Freeze, Thaw, Done, Failed, Wait].into_iter().find(|t| *t as u8 == byte)
    }
}

/// How a step ended, in a form that needs no memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Answer {
    pub(crate) code: Code,
    /// Which superblock.
    pub(crate) index: u8,
    pub(crate) errno: i32,
    pub(crate) nanoseconds: u64,
}

macro_rules! codes {
    ($($(#[doc = $doc:literal])* $name:ident = $n:literal),* $(,)?) => {
        /// How a step ended.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(crate) enum Code { $($(#[doc = $doc])* $name = $n),* }
        impl Code {
            fn from_byte(byte: u8) -> Option<Self> {
                match byte { $($n => Some(Self::$name),)* _ => None }
            }
        }
    };
}

codes! {
    /// As it should be.
    Fine = 0,
    /// The limit passed.
    Deadline = 1,
    /// FIFREEZE, syncfs or something else failed with `errno`.
    Errno = 2,
    /// There is no guard.
    GuardGone = 3,
    /// Somebody else thawed.
    Lost = 4,
    /// The guard or the agent thawed.
    Rescued = 5,
    /// The helper was told to end.
    Ended = 6,
    /// Mounts or devices changed.
    Changed = 7,
    /// A thaw failed.
    ThawFailed = 8,
    /// Too many superblocks.
    TooMany = 9,
    /// Not what can be asked now.
    NotNow = 10,
}

impl Answer {
    pub(crate) fn new(code: Code) -> Self {
        Self { code, index: 0, errno: 0, nanoseconds: 0 }
    }

    pub(crate) fn errno(index: usize, errno: i32) -> Self {
        Self { code: Code::Errno, index: index as u8, errno, nanoseconds: 0 }
    }

    fn to_bytes(self, tag: Tag) -> [u8; 15] {
        let mut bytes = [0; 15];
        (bytes[0], bytes[1], bytes[2]) = (tag as u8, self.code as u8, self.index);
        bytes[3..7].copy_from_slice(&self.errno.to_le_bytes());
        bytes[7..].copy_from_slice(&self.nanoseconds.to_le_bytes());
        bytes
    }
}

/// A packet that arrived.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) tag: Tag,
    bytes: [u8; MAX_BYTES],
    pub(crate) files: Vec<OwnedFd>,
}

impl Packet {
    pub(crate) fn number(&self) -> u64 {
        self.u64_at(1)
    }

    fn u64_at(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.bytes[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn answer(&self) -> io::Result<Answer> {
        let code = Code::from_byte(self.bytes[1]).ok_or_else(strange)?;
        let errno = self.u64_at(3) as u32 as i32;
        Ok(Answer { code, index: self.bytes[2], errno, nanoseconds: self.u64_at(7) })
    }

    /// What came as a file in memory, the first of `files`.
    pub(crate) fn json<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        if self.files.is_empty() {
            return Err(strange());
        }
        let mut file = File::from(self.files.remove(0));
        file.rewind()?;
        let mut text = Vec::new();
        // Arbitrary, far above what can be found on a machine.
        file.take(64 << 20).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

pub(crate) fn send(socket: impl AsFd, tag: Tag) -> io::Result<()> {
    send_bytes(socket, &[tag as u8], &[])
}

pub(crate) fn send_number(socket: impl AsFd, tag: Tag, number: u64) -> io::Result<()> {
    let mut bytes = [tag as u8; 9];
    bytes[1..].copy_from_slice(&number.to_le_bytes());
    send_bytes(socket, &bytes, &[])
}

pub(crate) fn send_answer(socket: impl AsFd, tag: Tag, answer: Answer) -> io::Result<()> {
    send_bytes(socket, &answer.to_bytes(tag), &[])
}

pub(crate) fn send_files(socket: impl AsFd, tag: Tag, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_bytes(socket, &[tag as u8], files)
}

pub(crate) fn send_json(socket: impl AsFd, tag: Tag, value: &impl Serialize) -> io::Result<()> {
    let mut file = File::from(rustix::fs::memfd_create("backhaul-freeze", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(value)?)?;
    send_files(socket, tag, &[file.as_fd()])
}

fn send_bytes(socket: impl AsFd, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::from_raw_os_error(rustix::io::Errno::TOOBIG.raw_os_error()));
    }
    loop {
        match rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

/// Waits for a packet; `None` at the end. Allocates only for descriptors.
pub(crate) fn receive(socket: impl AsFd) -> io::Result<Option<Packet>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; MAX_BYTES];
    let got = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            // Who died left something unread.
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            other => break other?,
        }
    };
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(strange());
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    Ok(Some(Packet { tag: Tag::from_byte(bytes[0]).ok_or_else(strange)?, bytes, files }))
}

pub(crate) fn strange() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not of this version; type: systemctl try-restart backhaul-freezer")
}

/// [`receive`], or `TimedOut`.
pub(crate) fn receive_within(socket: impl AsFd, within: Duration) -> io::Result<Option<Packet>> {
    let until = Instant::now() + within;
    loop {
        let mut fds = [PollFd::new(&socket, PollFlags::IN)];
        match poll(&mut fds, slice(Some(until)).as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) if Instant::now() >= until => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return receive(&socket),
            Err(e) => return Err(e.into()),
        }
    }
}

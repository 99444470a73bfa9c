//! Subscribers coming and going: accepting, the handshake, and a task a link that watches its socket and doorbell.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fstat;
use rustix::process::Pid;
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::journal::Note;
use super::shared::{Config, Control, Shared};
use crate::OnFull;
use crate::link::{Kind, LinkError, LinkTx, Seat, identify, truncated};
use crate::proto::layout::Geometry;
use crate::proto::wire::{self, Frame, Hello, RefusedReason};
use crate::reactor::Watched;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sys::bell::Bell;
use crate::sys::clock::monotonic_ns;
use crate::sys::process::Process;
use crate::sys::socket::{Connection, Listener, Received};
use crate::text::{Called, Hex, chain};

/// Connections that may be silent at a time. Each costs two descriptors and a task, and is looked at when a publisher
/// that was quiet is about to send.
///
/// When there is one more, the oldest is turned away of the process that has the most. A subscriber greets right after it
/// has connected, so an honest process rarely has one that is silent, and that one is safe from any other process that
/// has two. (Turning away the oldest of all would let whoever connects fast enough lock out the others; turning away the
/// newest, whoever came first.) What a user's own processes can do to each other with fewer than two each, they can do by
/// `kill` as well.
pub(crate) const SILENT_MAX: usize = 128;

/// Connections accepted in one go, before those who are connected have their turn: somebody may connect as fast as he is
/// accepted.
pub(crate) const ACCEPT_MAX: usize = 128;

/// Frames that a subscriber may have sent last: more than an honest one has to say.
const FRAMES_AT_THE_END: usize = 16;

/// When to try again after the system had no descriptor for a connection: they come free without a word.
const ACCEPT_RETRY_NS: u64 = 50_000_000;

/// Takes connections from the listening socket.
pub(crate) struct Acceptor {
    /// The publisher's socket, last; before it those that were removed under it, for who is in line with them.
    listeners: Mutex<Vec<Arc<Listener>>>,
    next_id: AtomicU64,
    /// Held by each link.
    seats: Seat,
    /// Accepted between the subscriber's connecting and its greeting. Whoever looks for new subscribers looks at these
    /// too: one whose `connect` has returned must not be passed over because somebody was quick to accept it.
    /// Oldest first.
    silent: Mutex<Vec<Silent>>,
    /// There may be more in line, of which the socket's readiness does not tell.
    more: AtomicBool,
    /// When to accept again, in clock nanoseconds, because it failed; 0 where it did not.
    retry_at: AtomicU64,
    /// When nobody was in line last, in clock nanoseconds: whoever is accepted connected after that. Changes with
    /// `silent` locked.
    nobody_at: AtomicU64,
}

/// A connection that has not said anything yet.
struct Silent {
    connection: Arc<Connection>,
    /// Whose it is: its number, if it has one in our pid namespace, and what else tells it from other processes.
    process: (Option<Pid>, u64),
    /// It connected after this, in clock nanoseconds.
    after: u64,
    /// Tells the task that serves it what came of its greeting. It must be told: whoever reads the greeting takes it off
    /// the socket, and the reactor then reports nothing, not even what it was woken for.
    task: oneshot::Sender<Result<Greeted, LinkError>>,
}

/// The link's id and doorbell.
type Greeted = (u64, Arc<Bell>);

/// A connection whose task has yet to be started.
pub(crate) struct NewLink {
    connection: Arc<Connection>,
    /// Becomes readable when the subscriber's process ends, even if a child of it holds the socket.
    process: Option<OwnedFd>,
    pid: Option<Pid>,
    greeting: Greeting,
}

enum Greeting {
    Done(Greeted),
    Awaited(oneshot::Receiver<Result<Greeted, LinkError>>),
}

impl Greeting {
    /// What has come of it by now. Nothing more does: a later reader of the greeting is told that the task is gone.
    fn close(&mut self) -> Option<Result<Greeted, LinkError>> {
        match self {
            Self::Done((link, bell)) => Some(Ok((*link, Arc::clone(bell)))),
            Self::Awaited(greeted) => {
                greeted.close();
                greeted.try_recv().ok()
            }
        }
    }
}

impl Acceptor {
    pub(crate) fn new(listener: impl Into<Option<Arc<Listener>>>) -> Self {
        Self {
            listeners: Mutex::new(listener.into().into_iter().collect()),
            next_id: AtomicU64::new(0),
            seats: Seat::default(),
            silent: Mutex::default(),
            more: AtomicBool::new(false),
            retry_at: AtomicU64::new(0),
            nobody_at: AtomicU64::new(0),
        }
    }

    /// Accepts whoever has connected, and welcomes those whose greeting is there already with the next run of
    /// delivery. Their tasks are left to the tx task, which is signalled.
    pub(crate) fn accept_pending(&self, shared: &Shared) {
        // Held throughout: a connection is never in the hands of one who looks while another finds nothing.
        let mut silent = self.silent.lock();
        greet_silent(shared, &mut silent);
        self.accept(shared, &mut silent);
    }

    /// Accepts whoever has connected; who was accepted before is left to his task. For the tx task.
    pub(crate) fn accept_new(&self, shared: &Shared) {
        self.accept(shared, &mut self.silent.lock());
    }

    /// Whether more have connected than were accepted in one go.
    pub(crate) fn has_more(&self) -> bool {
        self.more.load(Ordering::Acquire)
    }

    /// A seat for one link more, unless there are `most` already. With `silent` locked.
    fn seat(&self, most: u32) -> Result<Seat, LinkError> {
        // All but ours. Links may go meanwhile, and none comes.
        let taken = Arc::strong_count(&self.seats) - 1;
        if taken < most as usize { Ok(Arc::clone(&self.seats)) } else { Err(LinkError::Full) }
    }

    /// When the tx task has to accept again after a failure, in clock nanoseconds.
    pub(crate) fn retry_at(&self) -> Option<u64> {
        Some(self.retry_at.load(Ordering::Acquire)).filter(|at| *at != 0)
    }

    /// Has the tx task accept again at once, if it failed.
    pub(crate) fn descriptors_came_free(&self) {
        // Relaxed: at worst it takes as long as without this.
        let _ = self.retry_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |at| (at != 0).then_some(1));
    }

    fn accept(&self, shared: &Shared, silent: &mut Vec<Silent>) {
        let after = self.nobody_at.load(Ordering::Relaxed);
        for _ in 0..ACCEPT_MAX {
            let now = monotonic_ns();
            let accepted = self.accept_one();
            let retry_at = if accepted.is_err() { now + ACCEPT_RETRY_NS } else { 0 };
            let failing = self.retry_at.swap(retry_at, Ordering::AcqRel) != 0;
            let connection = match accepted {
                Ok(Some(connection)) => {
                    kill_point!("accept: accepted");
                    Arc::new(connection)
                }
                Ok(None) => {
                    self.nobody_at.store(now, Ordering::Relaxed);
                    self.more.swap(false, Ordering::AcqRel);
                    return;
                }
                Err(error) => {
                    self.more.swap(false, Ordering::AcqRel);
                    if !failing {
                        // The tx task tells it, and sets its timer.
                        shared.log(Note::CannotAccept(error));
                    }
                    return;
                }
            };
            match admit(shared, &connection, after, silent) {
                Ok(new) => {
                    let mut new_links = shared.new_links.lock();
                    if shared.has_ended() {
                        // Nobody is going to start its task: it must see the end here.
                        new.refuse();
                        return;
                    }
                    new_links.push(new);
                    drop(new_links);
                    shared.notify();
                }
                Err(error) => {
                    let process = connection.peer_credentials().ok().and_then(|peer| peer.pid);
                    shared.log(Note::Refused(process, error));
                }
            }
        }
        self.more.swap(true, Ordering::AcqRel);
        shared.notify();
    }

    fn accept_one(&self) -> io::Result<Option<Connection>> {
        let mut listeners = self.listeners.lock();
        loop {
            // A model's publisher has none.
            let Some(first) = listeners.first() else { return Ok(None) };
            let accepted = first.accept();
            // The last stays, and none of those before it gets any more in line.
            if !matches!(accepted, Ok(None)) || listeners.len() == 1 {
                return accepted;
            }
            listeners.remove(0);
        }
    }

    /// Accepts from this one as well, and from the present one only who is in line already: others look for another name.
    pub(crate) fn listen_on(&self, listener: Arc<Listener>) {
        self.shut_down();
        self.listeners.lock().push(listener);
    }

    /// Lets nobody in line any more.
    fn shut_down(&self) {
        self.listeners.lock().iter().for_each(|listener| listener.shutdown());
    }

    /// Reads the greeting of one that was silent, if it is there.
    fn greet(&self, shared: &Shared, connection: &Arc<Connection>) {
        let mut silent = self.silent.lock();
        if let Some(at) = silent.iter().position(|one| Arc::ptr_eq(&one.connection, connection))
            && let Some(greeted) = greet(shared, connection, silent[at].after).transpose()
        {
            silent.remove(at).tell(shared, greeted);
        }
    }

    /// Accepts for the last time: all who are in line, with no more to come, and have greeted are welcomed by the run of delivery that
    /// this is called in, just before the end. They are owed what was sent since they connected, and are told how much that was. Their
    /// links have no tasks.
    pub(crate) fn accept_last(&self, shared: &Shared) {
        let mut silent = self.silent.lock();
        // Bounded by the length of the line from now on.
        self.shut_down();
        let after = self.nobody_at.load(Ordering::Relaxed);
        while let Ok(Some(connection)) = self.accept_one() {
            let connection = Arc::new(connection);
            if let Err(error) = admit(shared, &connection, after, &mut silent) {
                let process = connection.peer_credentials().ok().and_then(|peer| peer.pid);
                shared.log(Note::Refused(process, error));
            }
        }
        for one in silent.drain(..) {
            // Either its greeting is there, or it learns that it comes too late: its `connect` has not returned.
            one.connection.shutdown_reading();
            if let Ok(Some(greeted)) = greet(shared, &one.connection, one.after) {
                // Where its task is gone nothing has to be done for the link any more.
                let _ = one.task.send(Ok(greeted));
            }
        }
    }

    /// Accepts nobody any more; who is still in line is turned away, and sees the end.
    pub(crate) fn close(&self) {
        self.silent.lock().clear();
        self.shut_down();
        while let Ok(Some(connection)) = self.accept_one() {
            drop(connection);
        }
    }
}

impl Silent {
    fn tell(self, shared: &Shared, greeted: Result<Greeted, LinkError>) {
        // The task may end just now: then nobody would watch the link.
        if let Err(Ok((id, _))) = self.task.send(greeted) {
            shared.leave_word(Control::Part(id));
        }
    }
}

impl NewLink {
    /// Turns the subscriber away.
    pub(crate) fn refuse(self) {
        self.connection.shutdown();
    }
}

/// Runs a link until its subscriber is gone. Dropping it (with the tx task) leaves the link to the end of all.
pub(crate) async fn serve(shared: Arc<Shared>, mut new: NewLink) {
    let mut told = Told::new(&shared, new.pid);
    let outcome = watch(&shared, &mut new, &mut told).await;
    // A sender may have read the greeting, and added the link, of which this task was not to hear any more.
    if told.link.is_none()
        && let Some(Ok((link, _))) = new.greeting.close()
    {
        told.link = Some(link);
    }
    told.why = match &outcome {
        Ok(()) if told.left => Cow::Borrowed("it left"),
        Ok(()) => Cow::Borrowed("it is gone"),
        Err(error) => Cow::Owned(chain(error).to_string()),
    };
    if let Some(id) = told.link {
        shared.tell(match outcome {
            Ok(()) | Err(LinkError::Fault(_)) => Control::Remove(id),
            Err(_) => Control::Part(id),
        });
    }
}

/// Tells the log of a link, when it is up and when it is down, whatever ends its task.
struct Told<'a> {
    shared: &'a Shared,
    process: Called,
    link: Option<u64>,
    left: bool,
    why: Cow<'static, str>,
}

impl<'a> Told<'a> {
    fn new(shared: &'a Shared, pid: Option<Pid>) -> Self {
        // Its name now: when the link is down the process may be gone.
        let process = Called::of(pid);
        Self { shared, process, link: None, left: false, why: "the publisher has ended".into() }
    }

    fn up(&mut self, link: u64) {
        self.link = Some(link);
        let Config { topic, id, .. } = &self.shared.config;
        let (topic, publisher, process) = (topic.as_str(), Hex(*id), &self.process);
        tracing::debug!(topic, %publisher, link, %process, "link to a subscriber is up");
    }
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        let Config { topic, id, .. } = &self.shared.config;
        let (topic, publisher, process, why) = (topic.as_str(), Hex(*id), &self.process, &*self.why);
        match self.link {
            Some(link) => {
                tracing::debug!(topic, %publisher, link, %process, why, "link to a subscriber is down")
            }
            None => {
                tracing::debug!(topic, %publisher, %process, why, "a connection ended before it was a link")
            }
        }
    }
}

async fn watch(shared: &Shared, new: &mut NewLink, told: &mut Told<'_>) -> Result<(), LinkError> {
    let NewLink { connection, process, greeting, .. } = new;
    if let Greeting::Done((link, _)) = greeting {
        told.up(*link);
    }
    let socket = Watched::register(Arc::clone(connection))?;
    let process = process.take().map(Watched::register).transpose()?;
    let (link, bell) = match greeting {
        Greeting::Done((link, bell)) => (*link, Arc::clone(bell)),
        Greeting::Awaited(greeted) => {
            let told = loop {
                tokio::select! {
                    greeted = &mut *greeted => break greeted.ok(),
                    ready = socket.readable() => {
                        let mut ready = ready?;
                        shared.acceptor.greet(shared, connection);
                        match greeted.try_recv() {
                            // It is still silent, so there was nothing to read.
                            Err(TryRecvError::Empty) => ready.clear_ready(),
                            told => break told.ok(),
                        }
                    }
                    // It may have greeted before, and its greeting may have been read.
                    () = ended(process.as_ref()) => break greeting.close(),
                }
            };
            shared.pump();
            match told {
                Some(greeted) => greeted?,
                // It died before it had greeted; or the publisher has ended, or had too many who were silent.
                None => return Ok(()),
            }
        }
    };
    if told.link.is_none() {
        told.up(link);
    }
    let bell = Watched::register_bell(bell)?;
    loop {
        tokio::select! {
            ready = socket.readable() => {
                let mut ready = ready?;
                match read(connection)? {
                    Read::Frame(Frame::Leave) if !told.left => {
                        told.left = true;
                        shared.tell(Control::Leave(link));
                    }
                    Read::Frame(frame) => return Err(Kind::OutOfTurn(frame.name()).into()),
                    Read::Nothing => ready.clear_ready(),
                    Read::Eof => return Ok(()),
                }
            }
            () = ended(process.as_ref()) => return read_the_end(connection),
            ready = bell.writable() => {
                ready?.clear_ready();
                shared.pump();
            }
        }
    }
}

/// Tells, of a subscriber whose process has ended, whether a child of that process lives and may read what it had.
///
/// All that a process has open is closed before its end is told: where there is no end of file the socket is open in a process that
/// inherited it, by `fork`, and with it the memory of all that was held. What that process may read is not written again.
fn read_the_end(connection: &Connection) -> Result<(), LinkError> {
    for _ in 0..FRAMES_AT_THE_END {
        match read(connection)? {
            Read::Frame(_) => {}
            Read::Eof => return Ok(()),
            Read::Nothing => break,
        }
    }
    Err(io::Error::other("the subscriber's process has ended, and one that it forked has its socket").into())
}

/// Waits for the end of a process that can be watched.
async fn ended(process: Option<&Watched<OwnedFd>>) {
    match process {
        Some(process) if process.readable().await.is_ok() => {}
        _ => std::future::pending().await,
    }
}

enum Read {
    Frame(Frame),
    Nothing,
    Eof,
}

/// Reads a frame that comes without descriptors.
fn read(connection: &Connection) -> Result<Read, LinkError> {
    let mut bytes = [0; wire::FRAME_MAX + 1];
    match receive(connection, &mut bytes)? {
        Some((0, _)) => Ok(Read::Eof),
        None => Ok(Read::Nothing),
        Some((len, fds)) => {
            let frame = Frame::decode(&bytes[..len])?;
            match fds.len() {
                0 => Ok(Read::Frame(frame)),
                actual => Err(Kind::Descriptors { expected: 0, actual }.into()),
            }
        }
    }
}

/// Welcomes those whose greeting has come since they were accepted, with the next run of delivery. One system call where
/// there are none.
fn greet_silent(shared: &Shared, silent: &mut Vec<Silent>) {
    silent.retain(|one| !one.task.is_closed());
    if silent.is_empty() {
        return;
    }
    let mut fds: Vec<_> = silent.iter().map(|one| PollFd::new(&one.connection, PollFlags::IN)).collect();
    if !matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..)) {
        return;
    }
    let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    for (one, ready) in std::mem::take(silent).into_iter().zip(ready) {
        match if ready { greet(shared, &one.connection, one.after).transpose() } else { None } {
            Some(greeted) => one.tell(shared, greeted),
            None => silent.push(one),
        }
    }
}

/// Makes room among those who are silent.
fn turn_one_away(shared: &Shared, silent: &mut Vec<Silent>) {
    silent.retain(|one| !one.task.is_closed());
    if silent.len() < SILENT_MAX {
        return;
    }
    let mut counts = HashMap::new();
    for one in silent.iter() {
        *counts.entry(one.process).or_insert(0) += 1;
    }
    let most = counts.values().copied().max();
    if let Some(at) = silent.iter().position(|one| counts.get(&one.process).copied() == most) {
        let one = silent.remove(at);
        // It may have greeted just now.
        if let Some(greeted) = greet(shared, &one.connection, one.after).transpose() {
            return one.tell(shared, greeted);
        }
        shared.log(Note::TurnedAway(one.process.0));
        // Where its greeting is under way it is not to take this for our end.
        let refused = Frame::Refused(RefusedReason::OutOfResources);
        let _ = one.connection.send(refused.encode(&mut [0; wire::FRAME_MAX]), &[]);
        one.connection.shutdown();
    }
}

/// Looks who has connected, and reads his greeting if it is there.
fn admit(
    shared: &Shared,
    connection: &Arc<Connection>,
    after: u64,
    silent: &mut Vec<Silent>,
) -> Result<NewLink, LinkError> {
    let process = match identify(connection, &shared.config.access) {
        Ok(Process::Ended) => return Err(LinkError::Ended),
        Ok(process) => process.into_fd(),
        Err(error) => return Err(refuse(connection, error)),
    };
    let pid = connection.peer_credentials()?.pid;
    let greeting = match greet(shared, connection, after)? {
        Some(greeted) => Greeting::Done(greeted),
        None => {
            let (task, greeted) = oneshot::channel();
            // Since Linux 6.9 each process has an inode of its own; before, those without a number here count as one.
            let inode = process.as_ref().and_then(|fd| fstat(fd).ok()).map_or(0, |stat| stat.st_ino);
            turn_one_away(shared, silent);
            silent.push(Silent { connection: Arc::clone(connection), process: (pid, inode), after, task });
            Greeting::Awaited(greeted)
        }
    };
    Ok(NewLink { connection: Arc::clone(connection), process, pid, greeting })
}

/// Tells a subscriber that there will be no link, as far as it is of use to him.
fn refuse(connection: &Connection, error: LinkError) -> LinkError {
    let reason = match &error {
        LinkError::Fault(Kind::Stranger { .. }) => RefusedReason::NotPermitted,
        LinkError::Fault(_) => RefusedReason::NotUnderstood,
        LinkError::Full => RefusedReason::Full,
        LinkError::Keeping => RefusedReason::Keeping,
        LinkError::Page(_) | LinkError::Io(_) | LinkError::Ended => RefusedReason::OutOfResources,
    };
    let _ = connection.send(Frame::Refused(reason).encode(&mut [0; wire::FRAME_MAX]), &[]);
    error
}

/// Reads the subscriber's greeting, if it is there, and has its link welcomed by the next run of delivery.
fn greet(shared: &Shared, connection: &Arc<Connection>, after: u64) -> Result<Option<Greeted>, LinkError> {
    let mut bytes = [0; wire::FRAME_MAX + 1];
    let received = receive(connection, &mut bytes).map_err(|error| refuse(connection, error))?;
    let Some((len, fds)) = received else { return Ok(None) };
    if len == 0 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    match hello(shared, connection, after, &bytes[..len], fds) {
        Ok(greeted) => Ok(Some(greeted)),
        Err(error) => Err(refuse(connection, error)),
    }
}

fn hello(
    shared: &Shared,
    connection: &Arc<Connection>,
    after: u64,
    bytes: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<Greeted, LinkError> {
    let frame = Frame::decode(bytes)?;
    let Frame::Hello(Hello { subscriber, depth, on_full, connected_at_ns, waited_ns }) = frame else {
        return Err(Kind::OutOfTurn(frame.name()).into());
    };
    if !fds.is_empty() {
        return Err(Kind::Descriptors { expected: 0, actual: fds.len() }.into());
    }
    kill_point!("hello: read");
    let geometry = Geometry::new(depth).ok_or(Kind::OutOfTurn("Hello"))?;
    let on_full = match on_full.map(OnFull::from) {
        // A subscriber may ask for less than the publisher gives, not for more.
        Some(wish) if shared.config.on_full == OnFull::Wait => wish,
        _ => shared.config.on_full,
    };
    if shared.pool.core().budget.is_kept_by(subscriber) {
        return Err(LinkError::Keeping);
    }
    let seat = shared.acceptor.seat(shared.config.max_subscribers)?;
    // It connected between `after` and now: any other time is that of another clock. Where that is ahead, it is owed what was sent since
    // it can have connected; where it is behind, it is owed no more than that.
    let connected_at = if connected_at_ns <= monotonic_ns() { connected_at_ns.max(after) } else { after };
    let connected_at = connected_at.saturating_sub(waited_ns);
    let id = shared.acceptor.next_id.fetch_add(1, Ordering::Relaxed);
    let dropped = Arc::clone(&shared.dropped);
    let (mut seed, bell) =
        LinkTx::prepare(id, Arc::clone(connection), geometry, on_full, connected_at, dropped, seat)?;
    seed.link.subscriber = subscriber;
    kill_point!("hello: link prepared");
    shared.leave_word(Control::Add(Box::new(seed)));
    Ok((id, bell))
}

/// One packet: its length, 0 for the end, and its descriptors.
fn receive(connection: &Connection, bytes: &mut [u8]) -> Result<Option<(usize, Vec<OwnedFd>)>, LinkError> {
    match connection.recv(bytes) {
        Ok(Received::WouldBlock) => Ok(None),
        Ok(Received::Eof) => Ok(Some((0, Vec::new()))),
        Ok(Received::Packet { len, fds, truncated: true }) => Err(truncated(bytes, len, fds.len()).into()),
        Ok(Received::Packet { len, fds, .. }) => Ok(Some((len, fds.into_iter().collect()))),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Some((0, Vec::new()))),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ShmPublisher;
    use crate::access::Access;
    use crate::link::{LinkRx, Next};
    use crate::proto::wire::Welcome;
    use crate::topic::{RuntimeDir, TopicName, TopicWatch};

    fn sample(link: &mut LinkRx) -> crate::ShmSample {
        match link.next() {
            Next::Sample(sample) => sample,
            other => panic!("{other:?}"),
        }
    }

    /// A publisher and a subscriber's link that it has accepted and greeted, in two steps and before the link's task has
    /// run for the first time: nothing on its socket tells that task that there is a doorbell to watch.
    struct Hasty {
        _dir: tempfile::TempDir,
        runtime: tokio::runtime::Runtime,
        publisher: ShmPublisher,
        link: LinkRx,
    }

    impl Hasty {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let builder = ShmPublisher::builder("t").runtime_dir(dir.path());
            let publisher = builder.runtime(runtime.handle().clone()).bind().unwrap();
            let runtime_dir = RuntimeDir::resolve(Some(dir.path()), Access::default()).unwrap();
            let watch = TopicWatch::new(&runtime_dir, &TopicName::new("t").unwrap()).unwrap();
            let connection = watch.connect(publisher.id()).unwrap();
            publisher.shared.accept_now();
            let mut link =
                LinkRx::begin(publisher.id(), connection, 1, None, 1, &Access::default(), None).unwrap();
            publisher.shared.accept_now();
            link.read_socket();
            assert!(link.is_established());
            Self { _dir: dir, runtime, publisher, link }
        }
    }

    /// What the first message due is for a subscriber that says, after two messages were sent and two more when it had
    /// connected, that it connected at `claimed`.
    fn first_due(claimed: impl FnOnce() -> u64, waited_ns: u64) -> u64 {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let builder = ShmPublisher::builder("t").runtime_dir(dir.path());
        let publisher = builder.runtime(runtime.handle().clone()).bind().unwrap();
        publisher.try_send([0]).unwrap();
        publisher.try_send([1]).unwrap();
        publisher.shared.accept_now();
        let runtime_dir = RuntimeDir::resolve(Some(dir.path()), Access::default()).unwrap();
        let watch = TopicWatch::new(&runtime_dir, &TopicName::new("t").unwrap()).unwrap();
        let connection = watch.connect(publisher.id()).unwrap();
        publisher.try_send([2]).unwrap();
        publisher.shared.accept_now();
        publisher.try_send([3]).unwrap();
        let hello = Hello { subscriber: 1, connected_at_ns: claimed(), waited_ns, depth: 1, on_full: None };
        connection.send(Frame::Hello(hello).encode(&mut [0; wire::FRAME_MAX]), &[]).unwrap();
        publisher.shared.accept_now();
        let mut bytes = [0; wire::FRAME_MAX];
        let Received::Packet { len, .. } = connection.recv(&mut bytes).unwrap() else { panic!("no welcome") };
        match Frame::decode(&bytes[..len]) {
            Ok(Frame::Welcome(Welcome { expect_seq, next_seq: 4, .. })) => expect_seq,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn connection_at_a_time_that_cannot_be_is_owed_what_was_sent_since_nobody_was_in_line() {
        assert_eq!(first_due(|| u64::MAX, 0), 2);
        assert_eq!(first_due(|| monotonic_ns() + 60_000_000_000, 0), 2);
        assert_eq!(first_due(|| 0, 0), 2);
        assert_eq!(first_due(|| monotonic_ns() - 60_000_000_000, 0), 2);
        // An honest one is owed no more than it says, and what was sent while it tried in vain.
        assert_eq!(first_due(monotonic_ns, 0), 4);
        assert_eq!(first_due(monotonic_ns, 3_600_000_000_000), 0);
        assert_eq!(first_due(monotonic_ns, u64::MAX), 0);
    }

    /// Runs the other tasks until `done`.
    async fn until(what: &str, mut done: impl FnMut() -> bool) {
        let wait = async {
            while !done() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait).await.expect(what);
    }

    async fn come_to_rest() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn link_greeted_before_its_task_ran_hears_its_doorbell() {
        let Hasty { _dir, runtime, publisher, mut link } = Hasty::new();
        runtime.block_on(async {
            publisher.send([1]).await.unwrap();
            publisher.send([2]).await.unwrap();
            // The release has to wake somebody.
            come_to_rest().await;
            drop(sample(&mut link));
            until("nobody heard the release", || link.has_something()).await;
            assert_eq!(*sample(&mut link), [2]);
        });
    }

    #[test]
    fn link_greeted_before_its_task_ran_reads_what_came_after() {
        let Hasty { _dir, runtime, publisher, link } = Hasty::new();
        assert_eq!(publisher.subscriber_count(), 1);
        let mut link = link;
        let held = runtime.block_on(async {
            publisher.send([1]).await.unwrap();
            sample(&mut link)
        });
        link.leave();
        // With a sample held the socket stays open: only what was sent over it tells.
        runtime.block_on(until("nobody read it", || publisher.subscriber_count() == 0));
        drop(held);
    }
}

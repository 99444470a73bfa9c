//! Subscribers coming and going: accepting, the handshake, and a task a link that watches its socket and doorbell.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::shared::{Control, Shared};
use crate::OnFull;
use crate::link::{Kind, LinkError, LinkTx, identify};
use crate::proto::layout::Geometry;
use crate::proto::wire::{self, Frame, Hello, RefusedReason};
use crate::reactor::Watched;
use crate::sys::bell::Bell;
use crate::sys::process::Process;
use crate::sys::socket::{Connection, Listener, Received};

/// Takes connections from the listening socket.
pub(crate) struct Acceptor {
    listener: Arc<Listener>,
    next_id: AtomicU64,
    /// Accepted between the subscriber's connecting and its greeting. Whoever looks for new subscribers looks at these
    /// too: one whose `connect` has returned must not be passed over because somebody was quick to accept it.
    silent: Mutex<Vec<Silent>>,
}

/// A connection that has not said anything yet.
struct Silent {
    connection: Arc<Connection>,
    /// Tells the task that serves it what came of its greeting. It must be told: whoever reads the greeting takes it off
    /// the socket, and the reactor then reports nothing, not even what it was woken for.
    task: oneshot::Sender<Result<Greeted, LinkError>>,
}

/// The link's id and doorbell.
type Greeted = (u64, Bell);

/// A connection whose task has yet to be started.
pub(crate) struct NewLink {
    connection: Arc<Connection>,
    /// Becomes readable when the subscriber's process ends, even if a child of it holds the socket.
    process: Option<OwnedFd>,
    greeting: Greeting,
}

enum Greeting {
    Done(Greeted),
    Awaited(oneshot::Receiver<Result<Greeted, LinkError>>),
}

impl Acceptor {
    pub(crate) fn new(listener: Arc<Listener>) -> Self {
        Self { listener, next_id: AtomicU64::new(0), silent: Mutex::default() }
    }

    /// Accepts whoever has connected, and welcomes those whose greeting is there already with the next run of
    /// delivery. Their tasks are left to the tx task, which is signalled.
    pub(crate) fn accept_pending(&self, shared: &Shared) {
        // Held throughout: a connection is never in the hands of one who looks while another finds nothing.
        let mut silent = self.silent.lock();
        retry(shared, &mut silent);
        loop {
            let connection = match self.listener.accept() {
                Ok(Some(connection)) => Arc::new(connection),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a subscriber; raise RLIMIT_NOFILE if it is too low");
                    return;
                }
            };
            match admit(shared, connection, &mut silent) {
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
                Err(error) => tracing::debug!(%error, "refused a connection"),
            }
        }
    }

    /// Accepts nobody any more; who is still in line is turned away, and sees the end.
    pub(crate) fn close(&self) {
        self.silent.lock().clear();
        self.listener.shutdown();
        while let Ok(Some(connection)) = self.listener.accept() {
            drop(connection);
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
pub(crate) async fn serve(shared: Arc<Shared>, new: NewLink) {
    let mut id = None;
    let outcome = watch(&shared, new, &mut id).await;
    if let Err(error) = &outcome {
        tracing::debug!(%error, "a subscriber's link ended");
    }
    if let Some(id) = id {
        shared.tell(match outcome {
            Ok(()) | Err(LinkError::Fault(_)) => Control::Remove(id),
            Err(_) => Control::Part(id),
        });
    }
}

async fn watch(shared: &Shared, new: NewLink, id: &mut Option<u64>) -> Result<(), LinkError> {
    let NewLink { connection, process, greeting } = new;
    if let Greeting::Done((link, _)) = &greeting {
        *id = Some(*link);
    }
    let socket = Watched::register(Arc::clone(&connection))?;
    let process = process.map(Watched::register).transpose()?;
    let (link, bell) = match greeting {
        Greeting::Done(greeted) => greeted,
        Greeting::Awaited(mut greeted) => {
            let greeted = loop {
                tokio::select! {
                    greeted = &mut greeted => break greeted.ok(),
                    ready = socket.readable() => {
                        let mut ready = ready?;
                        retry(shared, &mut shared.acceptor.silent.lock());
                        match greeted.try_recv() {
                            // It is still silent, so there was nothing to read.
                            Err(TryRecvError::Empty) => ready.clear_ready(),
                            told => break told.ok(),
                        }
                    }
                    () = ended(process.as_ref()) => return Ok(()),
                }
            };
            shared.pump();
            match greeted {
                Some(greeted) => greeted?,
                // The publisher has ended.
                None => return Ok(()),
            }
        }
    };
    *id = Some(link);
    let bell = Watched::register(bell)?;
    loop {
        tokio::select! {
            ready = socket.readable() => {
                let mut ready = ready?;
                match read(&connection)? {
                    Read::Frame(Frame::Leave) => shared.tell(Control::Leave(link)),
                    Read::Frame(frame) => return Err(Kind::OutOfTurn(frame.name()).into()),
                    Read::Nothing => ready.clear_ready(),
                    Read::Eof => return Ok(()),
                }
            }
            () = ended(process.as_ref()) => return Ok(()),
            ready = bell.readable() => {
                ready?.clear_ready();
                shared.pump();
            }
        }
    }
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

/// Welcomes those whose greeting has come since they were accepted, with the next run of delivery.
fn retry(shared: &Shared, silent: &mut Vec<Silent>) {
    let mut at = 0;
    while let Some(Silent { connection, task }) = silent.get(at) {
        if task.is_closed() {
            silent.swap_remove(at);
        } else if let Some(greeted) = greet(shared, connection).transpose() {
            // The task may end just now: then nobody would watch the link.
            if let Err(Ok((id, _))) = silent.swap_remove(at).task.send(greeted) {
                shared.leave_word(Control::Part(id));
            }
        } else {
            at += 1;
        }
    }
}

/// Looks who has connected, and reads his greeting if it is there.
fn admit(
    shared: &Shared,
    connection: Arc<Connection>,
    silent: &mut Vec<Silent>,
) -> Result<NewLink, LinkError> {
    let process = match identify(&connection, &shared.config.access) {
        Ok(Process::Ended) => return Err(LinkError::Ended),
        Ok(process) => process.into_fd(),
        Err(error) => return Err(refuse(&connection, error)),
    };
    let greeting = match greet(shared, &connection)? {
        Some(greeted) => Greeting::Done(greeted),
        None => {
            let (task, greeted) = oneshot::channel();
            silent.push(Silent { connection: Arc::clone(&connection), task });
            Greeting::Awaited(greeted)
        }
    };
    Ok(NewLink { connection, process, greeting })
}

/// Tells a subscriber that there will be no link, as far as it is of use to him.
fn refuse(connection: &Connection, error: LinkError) -> LinkError {
    let reason = match &error {
        LinkError::Fault(Kind::Stranger { .. }) => RefusedReason::NotPermitted,
        LinkError::Fault(_) => RefusedReason::NotUnderstood,
        LinkError::Page(_) | LinkError::Io(_) | LinkError::Ended => RefusedReason::OutOfResources,
    };
    let _ = connection.send(Frame::Refused(reason).encode(&mut [0; wire::FRAME_MAX]), &[]);
    error
}

/// Reads the subscriber's greeting, if it is there, and has its link welcomed by the next run of delivery.
fn greet(shared: &Shared, connection: &Arc<Connection>) -> Result<Option<Greeted>, LinkError> {
    let mut bytes = [0; wire::FRAME_MAX + 1];
    let Some((len, fds)) = receive(connection, &mut bytes)? else { return Ok(None) };
    if len == 0 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    match hello(shared, connection, &bytes[..len], fds) {
        Ok(greeted) => Ok(Some(greeted)),
        Err(error) => Err(refuse(connection, error)),
    }
}

fn hello(
    shared: &Shared,
    connection: &Arc<Connection>,
    bytes: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<Greeted, LinkError> {
    let frame = Frame::decode(bytes)?;
    let Frame::Hello(Hello { depth, on_full, connected_at_ns, .. }) = frame else {
        return Err(Kind::OutOfTurn(frame.name()).into());
    };
    if !fds.is_empty() {
        return Err(Kind::Descriptors { expected: 0, actual: fds.len() }.into());
    }
    let geometry = Geometry::new(depth).ok_or(Kind::OutOfTurn("Hello"))?;
    let on_full = match on_full.map(OnFull::from) {
        // A subscriber may ask for less than the publisher gives, not for more.
        Some(wish) if shared.config.on_full == OnFull::Wait => wish,
        _ => shared.config.on_full,
    };
    let id = shared.acceptor.next_id.fetch_add(1, Ordering::Relaxed);
    let dropped = Arc::clone(&shared.dropped);
    let (seed, bell) =
        LinkTx::prepare(id, Arc::clone(connection), geometry, on_full, connected_at_ns, dropped)?;
    shared.leave_word(Control::Add(Box::new(seed)));
    Ok((id, bell))
}

/// One packet: its length, 0 for the end, and its descriptors.
fn receive(connection: &Connection, bytes: &mut [u8]) -> Result<Option<(usize, Vec<OwnedFd>)>, LinkError> {
    match connection.recv(bytes) {
        Ok(Received::WouldBlock) => Ok(None),
        Ok(Received::Eof) => Ok(Some((0, Vec::new()))),
        Ok(Received::Packet { fds, truncated: true, .. }) => {
            Err(Kind::Descriptors { expected: 0, actual: fds.len() + 1 }.into())
        }
        Ok(Received::Packet { len, fds, .. }) => Ok(Some((len, fds.into_iter().collect()))),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Some((0, Vec::new()))),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::ShmPublisher;
    use crate::access::Access;
    use crate::link::{LinkRx, Next};
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
            let connection = watch.dir().connect(publisher.id()).unwrap();
            publisher.shared.accept_now();
            let mut link = LinkRx::begin(publisher.id(), connection, 1, None, 1, &Access::default()).unwrap();
            publisher.shared.accept_now();
            link.read_socket();
            assert!(link.is_established());
            Self { _dir: dir, runtime, publisher, link }
        }
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

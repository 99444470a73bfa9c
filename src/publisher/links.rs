//! Subscribers coming and going: accepting, the handshake, and a task a link that watches its socket and doorbell.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

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
    silent: Mutex<Vec<Arc<Silent>>>,
}

/// A connection that has not said anything yet.
struct Silent {
    connection: Arc<Connection>,
    /// What came of its greeting, for the task that serves it.
    greeted: Mutex<Option<Result<Greeted, LinkError>>>,
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
    Awaited(Arc<Silent>),
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
    let (link, bell) = match greeting {
        Greeting::Done(greeted) => greeted,
        // The look comes first: whoever looked for new subscribers before this task ran may have read the greeting off
        // the socket, and nothing more comes there to wake us. From the registration on every greeting does.
        Greeting::Awaited(silent) => loop {
            retry(shared, &mut shared.acceptor.silent.lock());
            if let Some(greeted) = silent.greeted.lock().take() {
                shared.pump();
                break greeted?;
            }
            socket.readable().await?.clear_ready();
        },
    };
    *id = Some(link);
    let process = process.map(Watched::register).transpose()?;
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

/// Welcomes those whose greeting has come since they were accepted.
fn retry(shared: &Shared, silent: &mut Vec<Arc<Silent>>) {
    silent.retain(|silent| match greet(shared, &silent.connection).transpose() {
        None => true,
        Some(greeted) => {
            *silent.greeted.lock() = Some(greeted);
            false
        }
    });
}

/// Looks who has connected, and reads his greeting if it is there.
fn admit(
    shared: &Shared,
    connection: Arc<Connection>,
    silent: &mut Vec<Arc<Silent>>,
) -> Result<NewLink, LinkError> {
    let process = match identify(&connection) {
        Ok(Process::Ended) => return Err(LinkError::Ended),
        Ok(process) => process.into_fd(),
        Err(error) => return Err(refuse(&connection, error)),
    };
    let greeting = match greet(shared, &connection)? {
        Some(greeted) => Greeting::Done(greeted),
        None => {
            let new = Arc::new(Silent { connection: Arc::clone(&connection), greeted: Mutex::default() });
            silent.push(Arc::clone(&new));
            Greeting::Awaited(new)
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
    use crate::link::{LinkRx, Next};
    use crate::topic::{RuntimeDir, TopicName, TopicWatch};

    fn sample(link: &mut LinkRx) -> crate::ShmSample {
        match link.next() {
            Next::Sample(sample) => sample,
            other => panic!("{other:?}"),
        }
    }

    /// Somebody sees the connection before the greeting and somebody else the greeting, both before the link's task
    /// runs for the first time: it has a doorbell to watch, and nothing on its socket tells it so.
    #[test]
    fn link_greeted_before_its_task_ran_hears_its_doorbell() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let publisher = ShmPublisher::builder("t")
            .runtime_dir(dir.path())
            .runtime(runtime.handle().clone())
            .bind()
            .unwrap();
        let runtime_dir = RuntimeDir::resolve(Some(dir.path())).unwrap();
        let watch = TopicWatch::new(&runtime_dir, &TopicName::new("t").unwrap()).unwrap();
        let connection = watch.dir().connect(publisher.id()).unwrap();
        publisher.shared.accept_now();
        let mut link = LinkRx::begin(publisher.id(), connection, 1, None, 1).unwrap();
        publisher.shared.accept_now();
        link.read_socket();
        assert!(link.is_established());

        runtime.block_on(async {
            publisher.send([1]).await.unwrap();
            publisher.send([2]).await.unwrap();
            // Let all tasks come to rest before the release that has to wake them.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            drop(sample(&mut link));
            let delivered = async {
                while !link.has_something() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), delivered).await.expect("nobody heard the release");
            assert_eq!(*sample(&mut link), [2]);
        });
    }
}

//! iceoryx2. Awake it polls; parked it sends a notification after each message, which a listener blocks for, as its
//! documentation recommends. Overflow is off and the sender retries until delivered: nothing is lost.

use std::fmt::Debug;
use std::path::Path as StdPath;

use iceoryx2::config::Config;
use iceoryx2::node::{Node, NodeBuilder};
use iceoryx2::port::listener::Listener;
use iceoryx2::port::notifier::Notifier;
use iceoryx2::port::publisher::Publisher as Port;
use iceoryx2::port::subscriber::Subscriber as SubscriberPort;
use iceoryx2::port::update_connections::UpdateConnections as _;
use iceoryx2::prelude::{BackpressureStrategy, PortFactory as _, SignalHandlingMode, ipc};
use iceoryx2::service::port_factory::{event, publish_subscribe};
use iceoryx2_bb_container::semantic_string::SemanticString as _;
use iceoryx2_bb_system_types::file_name::FileName;
use iceoryx2_bb_system_types::path::Path;

use super::{Peer, Rx, Tx, until_some};
use crate::case::{Case, Mode};
use crate::payload;

pub(crate) struct Iceoryx2;

impl Peer for Iceoryx2 {
    type Tx = Publisher;
    type Rx = Subscriber;
}

type Service = ipc::Service;

pub(crate) struct Publisher {
    port: Port<Service, [u8], ()>,
    notifier: Option<Notifier<Service>>,
    topic: Topic,
}

impl Tx for Publisher {
    async fn open(case: &Case, name: &'static str) -> Self {
        let topic = Topic::open(case, name);
        let port = topic.messages.publisher_builder().initial_max_slice_len(case.size);
        let port =
            port.max_loaned_samples(2).backpressure_strategy(BackpressureStrategy::RetryUntilDelivered);
        let port = port.create().expect("publisher");
        let notifier = topic.bell.as_ref().map(|bell| bell.notifier_builder().create().expect("notifier"));
        Self { port, notifier, topic }
    }

    async fn connected(&mut self, receivers: usize) {
        let enough = || {
            let messages = self.topic.messages.dynamic_config().number_of_subscribers() >= receivers;
            let bell = self.topic.bell.as_ref();
            let listened = bell.is_none_or(|bell| bell.dynamic_config().number_of_listeners() >= receivers);
            (messages && listened).then_some(())
        };
        until_some(enough).await;
        self.port.update_connections().expect("connect");
    }

    async fn send(&mut self, size: usize, number: u64) {
        let mut loan = self.port.loan_slice_uninit(size).expect("loan");
        let bytes = loan.payload_mut();
        bytes.fill(std::mem::MaybeUninit::new(number as u8));
        bytes[..8].copy_from_slice(&number.to_le_bytes().map(std::mem::MaybeUninit::new));
        // SAFETY: every byte of it was written.
        #[allow(unsafe_code)]
        let loan = unsafe { loan.assume_init() };
        loan.send().expect("send");
        if let Some(notifier) = &self.notifier {
            notifier.notify().expect("notify");
        }
    }
}

pub(crate) struct Subscriber {
    port: SubscriberPort<Service, [u8], ()>,
    listener: Option<Listener<Service>>,
    _topic: Topic,
}

impl Rx for Subscriber {
    async fn open(case: &Case, name: &'static str) -> Self {
        let topic = Topic::open(case, name);
        let port = topic.messages.subscriber_builder().buffer_size(case.depth).create().expect("subscriber");
        let listener = topic.bell.as_ref().map(|bell| bell.listener_builder().create().expect("listener"));
        let there = || (topic.messages.dynamic_config().number_of_publishers() > 0).then_some(());
        until_some(there).await;
        // Connects now and not with the first message.
        port.has_samples().expect("connect");
        Self { port, listener, _topic: topic }
    }

    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        loop {
            if let Some(sample) = self.port.receive().expect("receive") {
                return look(sample.payload());
            }
            self.wait();
        }
    }

    /// Its buffer has room again when a message is taken out, whether or not it is held.
    async fn free(&mut self, freed: impl FnOnce()) -> u64 {
        while !self.port.has_samples().expect("look") {
            self.wait();
        }
        freed();
        payload::read(self.port.receive().expect("receive").expect("it was there").payload())
    }
}

impl Subscriber {
    fn wait(&mut self) {
        match &mut self.listener {
            Some(listener) => drop(listener.blocking_wait(|_| {}).expect("wait")),
            None => std::hint::spin_loop(),
        }
    }
}

/// The services behind a topic: messages, and what wakes those who sleep.
struct Topic {
    messages: publish_subscribe::PortFactory<Service, [u8], ()>,
    bell: Option<event::PortFactory<Service>>,
    _node: Node<Service>,
}

impl Topic {
    fn open(case: &Case, name: &str) -> Self {
        let node =
            NodeBuilder::new().config(&config(&case.dir)).signal_handling_mode(SignalHandlingMode::Disabled);
        let node = node.create::<Service>().expect("node");
        let service = name.try_into().expect("a plain name");
        let messages = retry(|| {
            let builder = node.service_builder(&service).publish_subscribe::<[u8]>();
            let builder = builder.enable_safe_overflow(false).subscriber_max_buffer_size(case.depth);
            let builder = builder.max_publishers(2).max_subscribers(32).max_nodes(64);
            builder.subscriber_max_borrowed_samples(1).open_or_create()
        });
        let bell = (case.mode != Mode::Awake).then(|| {
            retry(|| {
                let builder = node.service_builder(&service).event();
                builder.max_listeners(32).max_notifiers(2).max_nodes(64).open_or_create()
            })
        });
        Self { messages, bell, _node: node }
    }
}

/// Two processes that create a service at the same time may fail to.
fn retry<T, E: Debug>(mut open: impl FnMut() -> Result<T, E>) -> T {
    for _ in 0..100 {
        if let Ok(service) = open() {
            return service;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    open().expect("service")
}

/// All that it makes lies in the case's directory, or has the suite's prefix in its name.
fn config(dir: &StdPath) -> Config {
    let mut config = Config::default();
    let root = dir.join("i");
    config.global.set_root_path(&Path::new(root.as_os_str().as_encoded_bytes()).expect("a path"));
    let name = dir.file_name().expect("a directory of the suite");
    config.global.prefix = FileName::new(name.as_encoded_bytes()).expect("a file name");
    config
}

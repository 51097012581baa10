//! The thread that sends lines: it makes requests of them, and repeats a request until the collector has
//! answered it.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, mpsc::Sender},
    time::Duration,
};

use bytes::Bytes;
use opentelemetry_proto::tonic::{
    collector::logs::v1::ExportLogsServiceRequest,
    common::v1::InstrumentationScope,
    logs::v1::{ResourceLogs, ScopeLogs},
    resource::v1::Resource,
};
use prost::Message as _;

use super::{
    client::{Client, Delivery},
    queue::{Queue, QueuedLine},
    record,
};
use crate::sandbox;

/// The wait after the first failed attempt. It doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// The longest wait between two attempts, unless the collector asks for a longer one.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// What the thread needs.
pub struct Exporter {
    /// The lines to send.
    pub queue: Arc<Queue>,
    /// Sends them.
    pub client: Client,
    /// What all records have in common.
    pub resource: Resource,
    /// The collector's URL, as it is shown.
    pub url: String,
    /// Whether the thread gives up the privileges that it does not need.
    pub restrict: bool,
    /// Told when everything has been sent.
    pub done: Sender<()>,
}

impl Exporter {
    /// Sends lines until the queue is closed and empty. To be called in a thread of its own.
    pub fn run(mut self) {
        if self.restrict
            && let Err(error) = sandbox::enter_for_network()
        {
            log::warn!("a thread continues with all its privileges: {error:#}");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match runtime {
            Ok(runtime) => {
                runtime.block_on(self.send_all());
                // The trace may have ended.
                let _ = self.done.send(());
            }
            // What is in the queue is counted as lost when the trace ends.
            Err(error) => eprintln!("tcpclose: cannot export lines: {error}"),
        }
    }

    async fn send_all(&mut self) {
        let mut tells_refusal = true;
        while let Some(batch) = self.queue.next_batch().await {
            let (request, broken) = self.request(&batch);
            let (refused, message) = self.deliver(request).await;
            if let Some(message) = message {
                log::warn!("{}: {message}", self.url);
                if std::mem::take(&mut tells_refusal) {
                    eprintln!("tcpclose: {} has refused lines, or warns: {message}", self.url);
                }
            }
            self.queue.settle(&batch, refused.saturating_add(broken));
        }
    }

    /// The request with the records of these lines, and the number of lines that are none.
    fn request(&self, batch: &[QueuedLine]) -> (Bytes, u64) {
        let mut log_records = Vec::with_capacity(batch.len());
        let mut broken = 0;
        for line in batch {
            match record::of_line(line) {
                Ok(record) => log_records.push(record),
                Err(error) => {
                    log::warn!("a line cannot be exported: {error}");
                    broken += 1;
                }
            }
        }
        let scope = InstrumentationScope {
            name: record::NAME.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..InstrumentationScope::default()
        };
        let logs = ScopeLogs { scope: Some(scope), log_records, ..ScopeLogs::default() };
        let logs = ResourceLogs {
            resource: Some(self.resource.clone()),
            scope_logs: vec![logs],
            ..ResourceLogs::default()
        };
        (ExportLogsServiceRequest { resource_logs: vec![logs] }.encode_to_vec().into(), broken)
    }

    /// Sends a request until the collector answers it. Returns how many records it has refused, and why.
    async fn deliver(&mut self, request: Bytes) -> (u64, Option<String>) {
        let mut wait = FIRST_WAIT;
        let mut has_failed = false;
        loop {
            let (after, message) = match self.client.send(request.clone()).await {
                Delivery::Answered { refused, message } => {
                    if has_failed {
                        eprintln!("tcpclose: {} answers again", self.url);
                    }
                    return (refused, message);
                }
                Delivery::TryAgain { after, message } => (after, message),
            };
            log::debug!("{}: {message}", self.url);
            if !has_failed {
                eprintln!("tcpclose: {}: {message}; lines wait, and are sent again", self.url);
                has_failed = true;
            }
            if let Some(after) = after {
                self.queue.pause(after, false).await;
            } else {
                // There is little time left once the trace has ended.
                let longest = if self.queue.is_closing() { FIRST_WAIT } else { LONGEST_WAIT };
                self.queue.pause(jittered(wait.min(longest)), !self.queue.is_closing()).await;
            }
            wait = (2 * wait).min(LONGEST_WAIT);
        }
    }
}

/// Between half of a time and all of it, so that the hosts of a fleet do not all come at the same moment.
fn jittered(time: Duration) -> Duration {
    let share = RandomState::new().hash_one(0) % 512;
    time / 2 + time * u32::try_from(share).unwrap_or(0) / 1024
}

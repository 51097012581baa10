//! `--otlp`: every line also becomes a log record of OpenTelemetry, which is sent to a collector by OTLP over
//! HTTP (<https://opentelemetry.io/docs/specs/otlp/>).
//!
//! The trace serializes a line as `-o json` does, and puts it into a [queue], which is bounded and never
//! blocks. A thread of its own, which is restricted too, makes [records](record) of the lines and
//! [sends](exporter) them through an HTTP [client].
//!
//! The messages are those of the official `opentelemetry-proto`. Its SDK and `opentelemetry-otlp` (0.33) are
//! not used, because with them lines could be lost without being counted: `BatchLogProcessor` does not tell
//! how many records found no room in its queue, a batch is dropped when its repetitions have taken longer
//! than the time-out of one export, and the records that a partial success rejects are only logged.

mod client;
mod exporter;
mod queue;
mod record;
mod settings;

use std::{
    env, fs, io,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread,
    time::Duration,
};

use anyhow::Result;
use client::Client;
use exporter::Exporter;
use jiff::Timestamp;
use queue::{Queue, QueuedLine};
use settings::Settings;

use crate::{
    event::Event,
    failure::Failure,
    sink::{Sink, append_json},
};

/// How long the end of a trace waits for lines that are not sent yet.
const PATIENCE_AT_END: Duration = Duration::from_secs(5);

/// A sink whose lines a collector gets.
pub struct OtlpSink {
    queue: Arc<Queue>,
    /// Says when everything has been sent.
    done: Receiver<()>,
    has_finished: bool,
}

impl OtlpSink {
    /// Starts the thread that sends lines to the collector at `url`, or where the variables of OpenTelemetry
    /// say if that is empty. With `restrict`, it gives up the privileges that it does not need.
    ///
    /// # Errors
    /// The URL or a variable is not what it has to be, or the thread cannot be started.
    pub fn start(url: &str, restrict: bool) -> Result<Self> {
        let settings = Settings::new(url, |name| env::var(name).ok())?;
        let queue = Arc::new(Queue::new(settings.max_lines));
        let (sender, done) = channel();
        let host =
            nix::sys::utsname::uname().ok().and_then(|host| host.nodename().to_str().map(str::to_owned));
        // A new UUID each time it is read.
        let instance = fs::read_to_string("/proc/sys/kernel/random/uuid").ok();
        let exporter = Exporter {
            queue: Arc::clone(&queue),
            resource: record::resource(host, instance.map(|id| id.trim().to_owned()), &settings.resource),
            url: settings.url.to_string(),
            client: Client::new(settings),
            restrict,
            done: sender,
        };
        let thread = thread::Builder::new().name("otlp".to_owned()).spawn(|| exporter.run());
        thread.map_err(|error| Failure::no_thread(&error))?;
        Ok(Self { queue, done, has_finished: false })
    }
}

impl Sink for OtlpSink {
    fn write(&mut self, event: &Event) -> io::Result<()> {
        if self.has_finished {
            return Ok(());
        }
        let mut json = Vec::new();
        append_json(&mut json, event)?;
        json.shrink_to_fit();
        let observed = u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0);
        self.queue.add(QueuedLine { json, observed });
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Waits until everything has been sent, for a limited time. What is written later is not sent.
    fn finish(&mut self) -> io::Result<()> {
        if !self.has_finished {
            self.has_finished = true;
            self.queue.close();
            // What is left then is counted.
            let _ = self.done.recv_timeout(PATIENCE_AT_END);
            self.queue.give_up();
        }
        Ok(())
    }

    fn lost(&self) -> u64 {
        self.queue.lost()
    }
}

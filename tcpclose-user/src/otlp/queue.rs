//! Lines on their way from the trace to the exporter. The trace never waits: a line that does not fit is
//! counted as lost.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    sync::Notify,
    time::{Duration, timeout},
};

/// The bytes of all lines in the queue, those that are being sent among them.
const MAX_BYTES: usize = 64 << 20;

/// The most lines in one request (`OTEL_BLRP_MAX_EXPORT_BATCH_SIZE` of the specification).
pub const MAX_BATCH_LINES: usize = 512;

/// The bytes of lines after which a request takes no more. Servers limit requests, some of them to 1 MiB.
const MAX_BATCH_BYTES: usize = 512 << 10;

/// How long lines gather for a request (`OTEL_BLRP_SCHEDULE_DELAY` of the specification).
const GATHER: Duration = Duration::from_secs(1);

/// A line as `-o json` writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedLine {
    /// The JSON object.
    pub json: Vec<u8>,
    /// When it was written, nanoseconds since 1970.
    pub observed: u64,
}

/// The queue.
pub struct Queue {
    state: Mutex<QueueState>,
    /// Tells the exporter that there is something to do.
    changed: Notify,
    /// Lines that no collector has taken, and will take.
    lost: AtomicU64,
    max_lines: usize,
}

#[derive(Default)]
struct QueueState {
    waiting: VecDeque<QueuedLine>,
    /// Lines and bytes in the queue and in the request that is being sent.
    lines: usize,
    bytes: usize,
    /// No line is added any more.
    is_closing: bool,
    /// What was still in the queue has been counted as lost.
    is_closed: bool,
}

impl QueueState {
    fn fills_a_batch(&self) -> bool {
        self.waiting.len() >= MAX_BATCH_LINES || self.bytes >= MAX_BATCH_BYTES
    }
}

impl Queue {
    /// An empty queue, for at most `max_lines` lines.
    pub fn new(max_lines: usize) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), lost: AtomicU64::new(0), max_lines }
    }

    /// Adds a line, or counts it as lost if there is no room.
    pub fn add(&self, line: QueuedLine) {
        let mut state = self.lock();
        let bytes = state.bytes.saturating_add(line.json.len());
        if state.is_closing || state.lines >= self.max_lines || bytes > MAX_BYTES {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let had_enough = state.fills_a_batch();
        state.lines += 1;
        state.bytes = bytes;
        state.waiting.push_back(line);
        // Not each line, because each would wake the exporter.
        let is_news = state.waiting.len() == 1 || state.fills_a_batch() != had_enough;
        drop(state);
        if is_news {
            self.changed.notify_one();
        }
    }

    /// How many lines are lost.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// The lines of the next request, once there are enough or they have waited long enough; `None` when the
    /// queue is closing and empty. They stay in the queue, as far as its bounds are concerned, until they are
    /// [settled](Self::settle).
    pub async fn next_batch(&self) -> Option<Vec<QueuedLine>> {
        loop {
            {
                let state = self.lock();
                if !state.waiting.is_empty() {
                    break;
                }
                if state.is_closing {
                    return None;
                }
            }
            self.changed.notified().await;
        }
        let is_complete = || {
            let state = self.lock();
            state.is_closing || state.fills_a_batch()
        };
        let complete = async {
            while !is_complete() {
                self.changed.notified().await;
            }
        };
        // That time is up is as good.
        let _ = timeout(GATHER, complete).await;
        let mut state = self.lock();
        let mut bytes = 0;
        let mut batch = Vec::new();
        while batch.len() < MAX_BATCH_LINES
            && let Some(line) = state.waiting.pop_front()
        {
            bytes += line.json.len();
            if bytes > MAX_BATCH_BYTES && !batch.is_empty() {
                state.waiting.push_front(line);
                break;
            }
            batch.push(line);
        }
        Some(batch)
    }

    /// Forgets the lines of a request that is done, `refused` of which were not taken.
    pub fn settle(&self, batch: &[QueuedLine], refused: u64) {
        let mut state = self.lock();
        if state.is_closed {
            return;
        }
        state.lines = state.lines.saturating_sub(batch.len());
        let bytes: usize = batch.iter().map(|line| line.json.len()).sum();
        state.bytes = state.bytes.saturating_sub(bytes);
        self.lost.fetch_add(refused.min(batch.len() as u64), Ordering::Relaxed);
    }

    /// Waits for this time; if `hurries`, only until the queue is closing.
    pub async fn pause(&self, time: Duration, hurries: bool) {
        let closing = async {
            while !(hurries && self.lock().is_closing) {
                self.changed.notified().await;
            }
        };
        // That time is up is as good.
        let _ = timeout(time, closing).await;
    }

    /// Whether no line is added any more.
    pub fn is_closing(&self) -> bool {
        self.lock().is_closing
    }

    /// Ends the queue: what is in it is still sent.
    pub fn close(&self) {
        self.lock().is_closing = true;
        self.changed.notify_one();
    }

    /// Counts what is still in the queue as lost. What is in the request that is being sent may have arrived.
    pub fn give_up(&self) {
        let mut state = self.lock();
        if !state.is_closed {
            state.is_closed = true;
            self.lost.fetch_add(state.lines as u64, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        // No code that holds the lock panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(bytes: usize) -> QueuedLine {
        QueuedLine { json: vec![b' '; bytes], observed: 0 }
    }

    #[tokio::test(start_paused = true)]
    async fn lines_beyond_the_bounds_are_counted() {
        let queue = Queue::new(3);
        for _ in 0..5 {
            queue.add(line(1));
        }
        assert_eq!(queue.lost(), 2);
        let batch = queue.next_batch().await.unwrap();
        assert_eq!(batch.len(), 3);
        queue.add(line(1));
        assert_eq!(queue.lost(), 3, "lines that are being sent are still in the queue");
        queue.settle(&batch, 1);
        assert_eq!(queue.lost(), 4);
        queue.add(line(MAX_BYTES));
        queue.add(line(1));
        assert_eq!(queue.lost(), 5);
        let batch = queue.next_batch().await.unwrap();
        assert_eq!(batch.len(), 1, "a line that is longer than a request should be has one of its own");
        queue.settle(&batch, 0);
        queue.close();
        assert_eq!(queue.next_batch().await, None);
        queue.give_up();
        assert_eq!(queue.lost(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_have_bounds() {
        let queue = Queue::new(usize::MAX);
        for _ in 0..=MAX_BATCH_LINES {
            queue.add(line(1));
        }
        queue.add(line(MAX_BATCH_BYTES));
        let mut sizes = Vec::new();
        queue.close();
        while let Some(batch) = queue.next_batch().await {
            sizes.push(batch.len());
            queue.settle(&batch, 0);
        }
        assert_eq!(sizes, [MAX_BATCH_LINES, 1, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_taken_in_time_is_lost_once() {
        let queue = Queue::new(usize::MAX);
        for _ in 0..MAX_BATCH_LINES + 7 {
            queue.add(line(1));
        }
        let sent = queue.next_batch().await.unwrap();
        queue.close();
        queue.give_up();
        queue.settle(&sent, 3);
        assert_eq!(queue.lost(), MAX_BATCH_LINES as u64 + 7);
    }
}

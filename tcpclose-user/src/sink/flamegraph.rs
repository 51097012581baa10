//! Closing stacks → a flame graph, as an SVG picture that a browser can search and zoom.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use inferno::flamegraph::{self, Options};

use super::folded::ClosingStacks;
use crate::event::Event;

/// Draws closing stacks when the trace ends.
pub struct FlameGraph {
    path: PathBuf,
    file: File,
    stacks: ClosingStacks,
}

impl FlameGraph {
    /// Prepares to write to the file at `path`. The file is created or emptied now, so that a path that
    /// cannot be written is an error before the trace and not after it.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file, stacks: ClosingStacks::default() })
    }

    /// Counts the event if it is the end of a connection.
    pub fn add(&mut self, event: &Event) {
        self.stacks.add(event);
    }

    /// Draws the stacks that were counted.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(self) -> Result<()> {
        let Self { path, file, stacks } = self;
        if stacks.is_empty() {
            eprintln!("tcpclose: no connection has ended, so there is no flame graph in {}", path.display());
            return Ok(());
        }
        let mut options = Options::default();
        "Ends of connections".clone_into(&mut options.title);
        "connections".clone_into(&mut options.count_name);
        // The same function has the same colour in every picture.
        options.hash = true;
        let lines: Vec<String> = stacks.lines().collect();
        let mut file = BufWriter::new(file);
        flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut file)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(file.flush()?))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::examples;

    fn drawn(events: &[Event]) -> String {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("graph.svg");
        let mut graph = FlameGraph::create(&path).expect("a file");
        for event in events {
            graph.add(event);
        }
        graph.finish().expect("written");
        std::fs::read_to_string(path).expect("a file")
    }

    #[test]
    fn draws_every_frame_with_its_share() {
        let Event::Close(mut evil) = examples::orderly() else { unreachable!() };
        evil.process.as_mut().expect("known").comm = "</title><script>x</script>".into();
        let svg = drawn(&[examples::orderly(), examples::orderly(), Event::Close(evil)]);
        assert!(svg.starts_with("<?xml") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for title in
            ["all (3 connections, 100%)", "orderly (3 connections, 100.00%)", "nginx (2 connections, 66.67%)"]
        {
            assert!(svg.contains(&format!("<title>{title}</title>")), "no {title}\n{svg}");
        }
        assert!(!svg.contains("<script>x"), "names are escaped");
    }

    #[test]
    fn without_ends_there_is_no_picture() {
        assert_eq!(drawn(&[examples::lost()]), "");
    }

    #[test]
    fn a_path_that_cannot_be_written_is_an_error_at_once() {
        let error = FlameGraph::create(Path::new("/nowhere/graph.svg")).err().expect("an error");
        assert!(format!("{error:#}").contains("/nowhere/graph.svg: No such file"), "{error:#}");
    }
}

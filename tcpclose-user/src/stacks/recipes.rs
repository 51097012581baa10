//! The recipes in the kernel half, and the record of them that is kept here: see [`tcpclose_common::recipe`].
//!
//! A stack that matches a recipe is the stack that was unwound, for these reasons:
//!
//! - Everything that its frames follow from is compared: the instruction pointer, and every word and register
//!   that unwinding needed. Words can be at other places only if an earlier word differs.
//! - The unwind tables are those of the mappings, which change with exec and with mmap and munmap. The
//!   address of the `mm_struct`, the process id and the number of mapped pages of code lead to the recipes.
//!   The memory of an `mm_struct` may be reused, but by the same process only after two calls of exec, and
//!   the recipes of the first program are removed as soon as the next one has a stack. The remaining case is
//!   that a library is unmapped, that another one with the same number of pages is mapped in its place
//!   between two stacks, and that it has calls before the same return addresses.
//! - Code of a language runtime can be replaced in place. Recipes with such frames expire (see
//!   [`Runtime::lifetime`]).
//!
//! [`Runtime::lifetime`]: super::runtimes::Runtime::lifetime

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap as BpfHashMap, MapData};
use foldhash::fast::RandomState;
use tcpclose_common::recipe::{Edge, EdgeTarget, MAX_RECIPES, Recipe, Word, image};

use crate::kernel::handle::KernelHalf;

/// Two of these maps are asked for each stack, so that hashing has to be quick.
type HashMap<K, V> = std::collections::HashMap<K, V, RandomState>;

/// The maps of the kernel half with the recipes, and the record of their contents.
pub struct RecipeMaps {
    recipes: Array<MapData, Recipe>,
    edges: BpfHashMap<MapData, Edge, EdgeTarget>,
    known: Recipes,
}

impl RecipeMaps {
    /// Takes the maps from the kernel half.
    ///
    /// # Errors
    /// The object lacks one.
    pub fn new(kernel: &mut KernelHalf) -> Result<Self> {
        Ok(Self {
            recipes: kernel.take_map("RECIPES")?,
            edges: kernel.take_map("RECIPE_EDGES")?,
            known: Recipes::new(MAX_RECIPES),
        })
    }

    /// Makes the kernel half recognize a stack.
    ///
    /// # Errors
    /// The kernel refuses to change a map.
    pub fn learn(&mut self, start: Start, words: &[Word], stack: u64, until: u64) -> Result<()> {
        let changes = self.known.learn(start, words, stack, until);
        self.apply(changes)
    }

    /// Removes all recipes of this process, because other code is mapped in place of its code.
    ///
    /// # Errors
    /// The kernel refuses to change a map.
    pub fn forget_process(&mut self, (pid, mm): (u32, u64)) -> Result<()> {
        let changes = self.known.forget_process((pid, mm));
        self.apply(changes)
    }

    fn apply(&mut self, changes: Vec<Change>) -> Result<()> {
        for change in changes {
            match change {
                Change::Recipe(index, recipe) => self.recipes.set(index, *recipe, 0),
                Change::Edge(edge, target) => self.edges.insert(edge, target, 0),
                Change::NoEdge(edge) => self.edges.remove(&edge),
            }
            .context("cannot change the recipes for stacks")?;
        }
        Ok(())
    }

    /// Records that a task of this process, with this `mm_struct`, had the stack.
    pub fn used(&mut self, process: (u32, u64), stack: u64) {
        self.known.used(process, stack);
    }

    /// Whether a recipe leads to this stack.
    pub fn leads_to(&self, stack: u64) -> bool {
        self.known.stacks.contains_key(&stack)
    }
}

/// Where the unwinding of a stack starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Start {
    /// Process id.
    pub pid: u32,
    /// Address of its `mm_struct`.
    pub mm: u64,
    /// How many pages of code are mapped.
    pub code_pages: u64,
    /// Instruction pointer.
    pub ip: u64,
}

/// A change of the maps. They must be made in order: a recipe is complete before an edge leads to it, and is
/// marked as unused before another one replaces it.
#[derive(Clone, Debug, PartialEq)]
enum Change {
    Recipe(u32, Box<Recipe>),
    Edge(Edge, EdgeTarget),
    NoEdge(Edge),
}

/// The recipes in the maps. When there is no room for another one, the tree that has had no hit for longest
/// is removed.
#[derive(Debug, Default)]
struct Recipes {
    trees: HashMap<Start, Tree>,
    /// By their index in the map.
    places: HashMap<u32, KnownRecipe>,
    edges: HashMap<Edge, EdgeTarget>,
    /// The number of recipes that lead to a stack.
    stacks: HashMap<u64, u32>,
    /// The tree with a stack of a process.
    tree_of: HashMap<(u32, u64, u64), Start>,
    free: Vec<u32>,
    serial: u64,
    clock: u64,
}

/// A recipe, without the room for more words that it has in the map.
#[derive(Debug)]
struct KnownRecipe {
    serial: u64,
    stack: u64,
    until: u64,
    words: Box<[Word]>,
}

impl KnownRecipe {
    /// The value of the map: with its serial number or, if it is being replaced, with 0.
    fn recipe(&self, serial: u64) -> Box<Recipe> {
        let Self { stack, until, words, .. } = self;
        let mut recipe = Box::new(Recipe {
            serial,
            stack: *stack,
            until: *until,
            count: words.len() as u64,
            ..Recipe::NONE
        });
        recipe.words[..words.len()].copy_from_slice(words);
        recipe
    }
}

/// The recipes of stacks that start at the same instruction.
#[derive(Debug, Default)]
struct Tree {
    members: Vec<(Edge, u32)>,
    used: u64,
}

/// The result of a walk through a tree by the words of a stack.
enum Walk {
    /// This recipe has all of them.
    Found(u32),
    /// No recipe continues with this word.
    Open(Edge),
    /// A recipe lists other places after the same words, so something has changed that the words do not show.
    Contradiction,
}

impl Recipes {
    fn new(size: u32) -> Self {
        Self { free: (0..size).rev().collect(), ..Self::default() }
    }

    fn learn(&mut self, start: Start, words: &[Word], stack: u64, until: u64) -> Vec<Change> {
        let mut changes = Vec::new();
        if !self.trees.contains_key(&start) {
            // An earlier program or earlier mappings of the process.
            let is_older =
                |it: &Start| it.pid == start.pid && (it.mm, it.code_pages) != (start.mm, start.code_pages);
            for older in self.trees.keys().filter(|it| is_older(it)).copied().collect::<Vec<_>>() {
                self.remove(older, &mut changes);
            }
        }
        let mut walk = self.walk(start, words);
        if matches!(walk, Walk::Contradiction) {
            self.remove(start, &mut changes);
            walk = Walk::Open(root(start));
        }
        let mut place = match walk {
            Walk::Found(index) => {
                self.replace(start, index, (stack, until), &mut changes);
                self.mark(start, stack);
                return changes;
            }
            Walk::Open(edge) => edge,
            Walk::Contradiction => root(start),
        };
        if self.free.is_empty() {
            let oldest = self.trees.iter().min_by_key(|(_, tree)| tree.used).map(|(start, _)| *start);
            let Some(oldest) = oldest else { return changes };
            self.remove(oldest, &mut changes);
            if oldest == start {
                place = root(start);
            }
        }
        let Some(index) = self.free.pop() else { return changes };
        self.serial += 1;
        let known = KnownRecipe { serial: self.serial, stack, until, words: words.into() };
        let target = EdgeTarget { serial: self.serial, index: index.into() };
        changes.push(Change::Recipe(index, known.recipe(known.serial)));
        changes.push(Change::Edge(place, target));
        self.places.insert(index, known);
        self.edges.insert(place, target);
        *self.stacks.entry(stack).or_default() += 1;
        self.trees.entry(start).or_default().members.push((place, index));
        self.mark(start, stack);
        changes
    }

    /// Walks as the kernel half does (`recipe::compared()`).
    fn walk(&self, start: Start, words: &[Word]) -> Walk {
        let mut edge = root(start);
        let mut index = 0;
        loop {
            let Some(target) = self.edges.get(&edge) else { return Walk::Open(edge) };
            let place = u32::try_from(target.index).unwrap_or(u32::MAX);
            let Some(recipe) = self.places.get(&place) else { return Walk::Contradiction };
            let known = &recipe.words;
            loop {
                let (Some(word), Some(expected)) = (words.get(index), known.get(index)) else {
                    return if words.len() == known.len() { Walk::Found(place) } else { Walk::Contradiction };
                };
                if (word.source, word.offset) != (expected.source, expected.offset) {
                    return Walk::Contradiction;
                }
                index += 1;
                if word.expected != expected.expected {
                    edge = Edge { from: recipe.serial, at: index as u64 - 1, word: word.expected };
                    break;
                }
            }
        }
    }

    /// Sets the stack that a recipe leads to, and until when.
    fn replace(&mut self, start: Start, index: u32, (stack, until): (u64, u64), changes: &mut Vec<Change>) {
        let Some(known) = self.places.get_mut(&index) else { return };
        if (known.stack, known.until) == (stack, until) {
            return;
        }
        let older = known.stack;
        (known.stack, known.until) = (stack, until);
        changes.push(Change::Recipe(index, known.recipe(0)));
        changes.push(Change::Recipe(index, known.recipe(known.serial)));
        *self.stacks.entry(stack).or_default() += 1;
        self.tree_of.remove(&(start.pid, start.mm, older));
        self.forget(older);
    }

    fn forget_process(&mut self, process: (u32, u64)) -> Vec<Change> {
        let mut changes = Vec::new();
        let is_its = |start: &Start| (start.pid, start.mm) == process;
        for start in self.trees.keys().filter(|it| is_its(it)).copied().collect::<Vec<_>>() {
            self.remove(start, &mut changes);
        }
        changes
    }

    fn remove(&mut self, start: Start, changes: &mut Vec<Change>) {
        let Some(tree) = self.trees.remove(&start) else { return };
        for (edge, index) in tree.members {
            self.edges.remove(&edge);
            changes.push(Change::NoEdge(edge));
            let Some(known) = self.places.remove(&index) else { continue };
            // The words are kept, so that a program that is comparing them does not read others.
            changes.push(Change::Recipe(index, known.recipe(0)));
            self.tree_of.remove(&(start.pid, start.mm, known.stack));
            self.forget(known.stack);
            self.free.push(index);
        }
    }

    /// Records that one recipe less leads to this stack.
    fn forget(&mut self, stack: u64) {
        if let Some(count) = self.stacks.get_mut(&stack) {
            *count -= 1;
            if *count == 0 {
                self.stacks.remove(&stack);
            }
        }
    }

    fn mark(&mut self, start: Start, stack: u64) {
        self.tree_of.insert((start.pid, start.mm, stack), start);
        self.used((start.pid, start.mm), stack);
    }

    fn used(&mut self, (pid, mm): (u32, u64), stack: u64) {
        if let Some(tree) = self.tree_of.get(&(pid, mm, stack)).and_then(|start| self.trees.get_mut(start)) {
            self.clock += 1;
            tree.used = self.clock;
        }
    }
}

/// The edge that leads to the first recipe of a tree.
fn root(start: Start) -> Edge {
    Edge { from: start.mm, at: start.ip, word: image(start.pid, start.code_pages) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tcpclose_common::recipe::source;

    use super::*;

    /// The contents of the kernel half's maps.
    #[derive(Default)]
    struct KernelMaps {
        recipes: HashMap<u32, Recipe>,
        edges: HashMap<Edge, EdgeTarget>,
    }

    impl KernelMaps {
        fn apply(&mut self, changes: Vec<Change>) {
            for change in changes {
                match change {
                    Change::Recipe(index, recipe) => {
                        let before = self.recipes.insert(index, *recipe);
                        let was_in_use = before.is_some_and(|before| before.serial != 0);
                        assert!(recipe.serial == 0 || !was_in_use, "{index} is replaced while it is in use");
                    }
                    Change::Edge(edge, target) => {
                        let recipe = self.recipes[&u32::try_from(target.index).unwrap()];
                        assert_eq!(recipe.serial, target.serial, "the recipe comes first");
                        assert!(self.edges.insert(edge, target).is_none());
                    }
                    Change::NoEdge(edge) => assert!(self.edges.remove(&edge).is_some()),
                }
            }
            let used: HashSet<_> = self.edges.values().map(|target| target.index).collect();
            assert_eq!(used.len(), self.edges.len(), "two edges lead to one recipe");
        }

        /// The stack that a program would find for these words.
        fn find(&self, start: Start, words: &[Word]) -> Option<u64> {
            let mut target = self.edges.get(&root(start))?;
            let mut index = 0;
            loop {
                let recipe = self.recipes[&u32::try_from(target.index).unwrap()];
                assert_eq!(recipe.serial, target.serial);
                if index as u64 == recipe.count {
                    return Some(recipe.stack);
                }
                let expected = recipe.words[index];
                let place = |word: &&Word| (word.source, word.offset) == (expected.source, expected.offset);
                let actual = words.iter().find(place)?.expected;
                if actual != expected.expected {
                    let edge = Edge { from: recipe.serial, at: index as u64, word: actual };
                    target = self.edges.get(&edge)?;
                }
                index += 1;
            }
        }
    }

    const START: Start = Start { pid: 7, mm: 0xffff_8880_0000_0000, code_pages: 9, ip: 0x1000 };

    /// The words of a call path: at each level one of three callers, whose frames have different sizes.
    fn path(mut number: u64) -> Vec<Word> {
        let mut offset = 0;
        (0..6)
            .map(|_| {
                let callee = number % 3;
                number /= 3;
                let word = Word { expected: 0x2000 + callee, offset, source: source::MEMORY };
                offset += 8 + 16 * i32::try_from(callee).unwrap();
                word
            })
            .collect()
    }

    #[test]
    fn finds_each_of_many_stacks() {
        let (mut recipes, mut kernel) = (Recipes::new(1000), KernelMaps::default());
        for number in 0..729 {
            assert_eq!(kernel.find(START, &path(number)), None, "{number}");
            kernel.apply(recipes.learn(START, &path(number), 1 + number, 0));
            assert_eq!(recipes.learn(START, &path(number), 1 + number, 0), [], "it is known");
        }
        for number in 0..729 {
            assert_eq!(kernel.find(START, &path(number)), Some(1 + number));
        }
        for other in [
            Start { mm: START.mm + 64, ..START },
            Start { pid: 8, ..START },
            Start { code_pages: 8, ..START },
            Start { ip: 0x1001, ..START },
        ] {
            assert_eq!(kernel.find(other, &path(0)), None);
        }
        assert_eq!(recipes.free.len(), 1000 - 729);
    }

    #[test]
    fn another_image_of_the_process_takes_the_place() {
        let (mut recipes, mut kernel) = (Recipes::new(10), KernelMaps::default());
        let another_place = Start { ip: 0x1001, ..START };
        let another_process = Start { pid: 8, ..START };
        for start in [START, another_place, another_process] {
            kernel.apply(recipes.learn(start, &path(0), 1, 0));
        }
        assert_eq!(recipes.trees.len(), 3);
        for later in [Start { mm: START.mm + 64, ..START }, Start { code_pages: 10, ..START }] {
            kernel.apply(recipes.learn(later, &path(1), 2, 0));
            assert_eq!(kernel.find(later, &path(1)), Some(2));
            assert_eq!(kernel.find(START, &path(0)), None);
            assert_eq!(kernel.find(another_place, &path(0)), None);
            assert_eq!(kernel.find(another_process, &path(0)), Some(1));
        }
        assert_eq!(recipes.free.len(), 8);
        kernel.apply(recipes.forget_process((START.pid, START.mm)));
        assert_eq!(kernel.find(Start { code_pages: 10, ..START }, &path(1)), None);
        assert_eq!(kernel.find(another_process, &path(0)), Some(1), "of another process");
        assert_eq!(recipes.free.len(), 9);
    }

    #[test]
    fn the_longest_unused_tree_gives_way() {
        let (mut recipes, mut kernel) = (Recipes::new(6), KernelMaps::default());
        let starts = [1, 2, 3].map(|ip| Start { ip, ..START });
        for (number, start) in starts.into_iter().enumerate() {
            let stack = 10 * number as u64;
            kernel.apply(recipes.learn(start, &path(0), stack, 0));
            kernel.apply(recipes.learn(start, &path(1), stack + 1, 0));
        }
        recipes.used((START.pid, START.mm), 0);
        kernel.apply(recipes.learn(starts[2], &path(2), 22, 0));
        assert_eq!(kernel.find(starts[0], &path(1)), Some(1));
        assert_eq!(kernel.find(starts[1], &path(0)), None);
        assert_eq!(kernel.find(starts[2], &path(2)), Some(22));
        assert_eq!(recipes.stacks.len(), 5);
        // A tree that takes all the room is removed, and starts again.
        for number in 0..100 {
            kernel.apply(recipes.learn(starts[0], &path(number), number, 0));
            assert_eq!(kernel.find(starts[0], &path(number)), Some(number));
        }
        assert!(recipes.places.len() <= 6 && recipes.edges.len() <= 6 && recipes.stacks.len() <= 6);
        assert!(recipes.tree_of.len() <= 6);
    }

    #[test]
    fn the_last_word_counts() {
        let (mut recipes, mut kernel) = (Recipes::new(10), KernelMaps::default());
        kernel.apply(recipes.learn(START, &path(0), 1, 5));
        kernel.apply(recipes.learn(START, &path(1), 2, 5));
        // The same stack, unwound again: it has another name by now, and is valid for longer.
        kernel.apply(recipes.learn(START, &path(0), 3, 9));
        assert_eq!(kernel.find(START, &path(0)), Some(3));
        assert!(!recipes.stacks.contains_key(&1));
        assert_eq!(recipes.tree_of.len(), 2);
        // After the same words, unwinding continued at another place, or ended.
        for words in [&[path(0)[0], Word { offset: 64, ..path(0)[1] }][..], &path(0)[..3]] {
            kernel.apply(recipes.learn(START, words, 4, 0));
            assert_eq!(kernel.find(START, words), Some(4));
            assert_eq!(recipes.places.len(), 1);
        }
        let longer = path(0);
        kernel.apply(recipes.learn(START, &longer, 5, 0));
        assert_eq!(kernel.find(START, &longer), Some(5));
    }
}

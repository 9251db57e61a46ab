//! What transformers makes of a tensor, where it knows the model's type: taken from its own code by `scripts/make facts`.
//!
//! [`table`] reads the file. A checkpoint's names are looked up in the class that config.json names, then in the type's
//! others: a base model's file is loaded by its heads' classes, and the other way round.

mod table;

use table::{Class, classes};

/// What a tensor is to transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// The weight of an exact `nn.Linear`, which clients make 4-bit.
    Linear,
    /// Becomes Linears' weights in other shapes or another order.
    Cut,
    /// A Linear that the class keeps in f32.
    Fp32,
    /// The output embedding.
    Head,
    /// A Linear with one row per label.
    Labels,
    /// A Linear that isn't quantized by default, as its weight is the model's last parameter.
    Last,
    /// A Linear that shares its weight with another module.
    Tied,
    /// A Linear inside a router.
    InRouter,
    /// transformers' `Conv1D`: stored as [in, out].
    Conv1d,
    /// A subclass of `nn.Linear` (grouped ones among them), which clients leave alone.
    Subclass,
    /// A table of `nn.Embedding`.
    Embedding,
    /// A router's own parameter.
    Router,
    /// The matrices of experts: of all of them in 3 dimensions, of one in 2.
    Experts,
    /// A convolution.
    Convolution,
    /// Another module's parameter.
    Parameter,
    /// A buffer.
    Buffer,
    /// A bias of more than one dimension.
    Bias,
}

/// Parts of names that a wrapper puts before those of the models in it, at most.
const WRAPPERS: usize = 3;

/// What is known of one checkpoint's tensors.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// The classes of the outermost `model_type`, the one that config.json names first; then those of the nested ones, which may
    /// load their part of the file.
    classes: Vec<Class>,
    /// How many of them are of the outermost type.
    own: usize,
}

impl Facts {
    /// What is known of a model of these types, the outermost first. None if transformers has none of them.
    pub(crate) fn new(model_types: &[&str]) -> Option<Facts> {
        let (outermost, nested) = model_types.split_first()?;
        let mut all: Vec<Class> = classes(outermost);
        let own = all.len();
        all.extend(nested.iter().flat_map(|model_type| classes(model_type)));
        (!all.is_empty()).then_some(Facts { classes: all, own })
    }

    /// Whether transformers has the outermost type.
    pub(crate) fn of_outermost(&self) -> bool {
        self.own > 0
    }

    /// The same, with the classes that config.json names before the type's others.
    pub(crate) fn of_classes(mut self, architectures: &[&str]) -> Facts {
        let place = |class: &Class| architectures.iter().position(|name| *name == class.name).unwrap_or(usize::MAX);
        self.classes[..self.own].sort_by_key(place);
        self
    }

    /// The first class alone.
    #[cfg(test)]
    pub(crate) fn of_first(mut self) -> Facts {
        self.classes.truncate(1);
        self.own = 1;
        self
    }

    /// What a tensor of this name and number of dimensions is: more than one kind if layers differ. Empty if no class
    /// has it.
    pub(crate) fn kinds(&self, tensor: &str, rank: usize) -> Vec<Kind> {
        let find =
            |tensor: &str| self.classes.iter().map(|class| class.kinds(tensor, rank)).find(|kinds| !kinds.is_empty());
        let wrapped = || {
            // In a wrapper that isn't known, a model that is keeps its names below the wrapper's own.
            let inner = tensor.match_indices('.').map(|(at, _)| &tensor[at + 1..]).take(WRAPPERS);
            let in_layers = |name: &&str| name.split('.').any(table::is_number);
            inner.filter(in_layers).find_map(find)
        };
        let whole = find(tensor);
        whole.or_else(|| if self.of_outermost() { None } else { wrapped() }).unwrap_or_default()
    }

    /// The modules that a tensor belongs to in the loaded model, in every class that has it, the first one's first. Empty if none
    /// has it.
    pub(crate) fn modules(&self, tensor: &str) -> Vec<String> {
        table::modules(&self.classes, tensor)
    }

    /// Linears without a tensor of their own, in any class of the type: tied heads. A number is `*`.
    pub(crate) fn off_disk(&self) -> Vec<&'static str> {
        distinct(self.classes[..self.own].iter().flat_map(Class::off_disk))
    }

    /// Heads of the type's classes, as their modules are called: a class that loads the file of another makes its own, with no
    /// tensor to load.
    pub(crate) fn heads(&self) -> Vec<String> {
        distinct(self.classes[..self.own].iter().flat_map(Class::heads))
    }
}

fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found: Vec<T> = Vec::new();
    all.for_each(|one| {
        if !found.contains(&one) {
            found.push(one);
        }
    });
    found
}

/// A class as tests see it: its model's type, its name, and each tensor's name, with `*` for numbers, and kinds with their numbers
/// of dimensions.
#[cfg(test)]
pub(crate) struct Known {
    pub(crate) model_type: &'static str,
    pub(crate) class: &'static str,
    pub(crate) tensors: Vec<(String, Vec<(Kind, usize)>)>,
}

/// Every class of every type.
#[cfg(test)]
pub(crate) fn all() -> impl Iterator<Item = Known> {
    table::model_types().into_iter().flat_map(|model_type| {
        classes(model_type).into_iter().map(move |class| {
            let tensors = class.tensors().into_iter().map(|(name, kinds)| (name, kinds.to_vec())).collect();
            Known { model_type, class: class.name, tensors }
        })
    })
}

//! Sources as people have them: what a folder or a file is, which of its files are the model's, what is copied and what is
//! left out, and what in it would hang a reader or fool a terminal.

mod choice;
mod downloads;
mod escapes;
mod inspect;
mod left_out;
mod leftovers;
mod links;
mod metadata;
mod places;
mod special_files;
#[path = "../support/mod.rs"]
mod support;

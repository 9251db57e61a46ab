//! The user's choices on top of the rules.

use regex::Regex;

use crate::error::{Error, Hint, Result, Setting};
use crate::models::{Rules, Verdict};
use crate::recipe::Recipe;

/// Decides tensor by tensor: `exclude` before `include` before `only_experts` before the rules.
pub(crate) struct Selection {
    only_experts: bool,
    include: Vec<Pattern>,
    exclude: Vec<Pattern>,
}

struct Pattern {
    setting: Setting,
    text: String,
    regex: Regex,
    /// A tensor whose name matches was seen.
    matched: bool,
    /// One of them could be quantized.
    of_use: bool,
}

impl Selection {
    /// # Errors
    /// When a pattern is no regular expression.
    pub(crate) fn new(recipe: &Recipe) -> Result<Selection> {
        let compile = |setting, texts: &[String]| -> Result<Vec<Pattern>> {
            texts.iter().map(|text| Pattern::new(setting, text)).collect()
        };
        Ok(Selection {
            only_experts: recipe.only_experts,
            include: compile(Setting::Include, &recipe.include)?,
            exclude: compile(Setting::Exclude, &recipe.exclude)?,
        })
    }

    /// The verdict on one tensor.
    pub(crate) fn decide(&mut self, rules: &Rules<'_>, name: &str, shape: &[u64]) -> Verdict {
        let mut verdict = rules.classify(name, shape);
        let matrix = matches!(shape.len(), 2 | 3) && !shape.contains(&0);
        let excluded = first_match(&mut self.exclude, name, true);
        let included = first_match(&mut self.include, name, matrix);
        if let Some(pattern) = excluded {
            (verdict.quantize, verdict.in_doubt) = (false, false);
            verdict.reason = format!("matches exclude pattern '{pattern}'").into();
        } else if let Some(pattern) = included {
            verdict.included = matrix;
            if matrix && !verdict.quantize {
                (verdict.quantize, verdict.in_doubt) = (true, false);
                verdict.reason = format!("matches include pattern '{pattern}'").into();
            }
        } else if self.only_experts && verdict.quantize && !verdict.role.is_expert() {
            (verdict.quantize, verdict.reason) = (false, "only experts are quantized".into());
        }
        verdict
    }

    /// # Errors
    /// When a pattern matched no tensor, or none that could be quantized: it can't be what was meant.
    pub(crate) fn check_patterns(&self) -> Result<()> {
        let error = |pattern: &Pattern, why: &str, hint| {
            let (setting, pattern, why) = (pattern.setting, pattern.text.clone(), why.to_owned());
            Err(Error::Pattern { setting, pattern, why, hint })
        };
        for pattern in self.include.iter().chain(&self.exclude) {
            if !pattern.matched {
                return error(pattern, "matches no tensor's name", Some(Hint::ListTensors));
            }
            if !pattern.of_use {
                return error(pattern, "matches only tensors that can't be quantized: they aren't 2-D or 3-D", None);
            }
        }
        Ok(())
    }
}

impl Pattern {
    fn new(setting: Setting, text: &str) -> Result<Pattern> {
        let regex = Regex::new(text).map_err(|error| Error::Pattern {
            setting,
            pattern: text.to_owned(),
            why: format!("not a regular expression: {error}"),
            hint: None,
        })?;
        Ok(Pattern { setting, text: text.to_owned(), regex, matched: false, of_use: false })
    }
}

/// The first pattern that matches; all that match are marked.
fn first_match(patterns: &mut [Pattern], name: &str, of_use: bool) -> Option<String> {
    let mut first = None;
    for pattern in patterns.iter_mut().filter(|pattern| pattern.regex.is_match(name)) {
        pattern.matched = true;
        pattern.of_use |= of_use;
        first = first.or_else(|| Some(pattern.text.clone()));
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(include: &[&str], exclude: &[&str], only_experts: bool) -> Selection {
        let own = |patterns: &[&str]| patterns.iter().map(|&text| text.to_owned()).collect();
        let recipe = Recipe { include: own(include), exclude: own(exclude), only_experts, ..Recipe::default() };
        Selection::new(&recipe).unwrap()
    }

    const HEAD: (&str, &[u64]) = ("lm_head.weight", &[320, 64]);
    const QUERY: (&str, &[u64]) = ("model.layers.0.self_attn.q_proj.weight", &[64, 64]);
    const EXPERT: (&str, &[u64]) = ("model.layers.0.mlp.experts.1.up_proj.weight", &[64, 64]);
    const NORM: (&str, &[u64]) = ("model.norm.weight", &[64]);

    fn quantized(mut selection: Selection) -> Vec<bool> {
        [HEAD, QUERY, EXPERT, NORM]
            .map(|(name, shape)| selection.decide(&Rules::new(&["qwen3_moe"]), name, shape).quantize)
            .to_vec()
    }

    #[test]
    fn exclude_beats_include_beats_only_experts_beats_the_rules() {
        assert_eq!(quantized(selection(&[], &[], false)), [false, true, true, false]);
        assert_eq!(quantized(selection(&["."], &[], false)), [true, true, true, false]);
        assert_eq!(quantized(selection(&[], &[], true)), [false, false, true, false]);
        assert_eq!(quantized(selection(&["q_proj"], &[], true)), [false, true, true, false]);
        assert_eq!(quantized(selection(&["_proj"], &["q_proj"], true)), [false, false, true, false]);
    }

    #[test]
    fn reasons_name_the_pattern() {
        let mut selection = selection(&["lm_head"], &["experts"], false);
        assert_eq!(selection.decide(&Rules::new(&[]), HEAD.0, HEAD.1).reason, "matches include pattern 'lm_head'");
        assert_eq!(selection.decide(&Rules::new(&[]), EXPERT.0, EXPERT.1).reason, "matches exclude pattern 'experts'");
    }

    #[test]
    fn patterns_that_do_nothing_are_errors() {
        for (include, exclude) in [(&["nothing"][..], &[][..]), (&[], &["nothing"]), (&["norm"], &[])] {
            let mut selection = selection(include, exclude, false);
            selection.decide(&Rules::new(&[]), NORM.0, NORM.1);
            assert!(matches!(selection.check_patterns(), Err(Error::Pattern { .. })));
        }
        let recipe = Recipe { include: vec!["(".to_owned()], ..Recipe::default() };
        assert!(matches!(Selection::new(&recipe), Err(Error::Pattern { .. })));
    }
}

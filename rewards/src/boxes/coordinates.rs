//! What the numbers of a box mean, and whether the data agrees.
//!
//! Models write boxes in thousandths (Qwen2-VL), in pixels (Qwen2.5-VL), in pixels of the resized input or within 0 to 1.
//! A wrong setting gives an IoU near zero for right answers and no error; [`check_coordinates`] looks at the data first.

use super::{Bbox, BoxError};
use serde::{Deserialize, Serialize};

/// The unit of box coordinates. In recipes and Lua: `"permille"`, `"pixels"`, `"unit"` or `{model_grid = {w = .., h = ..}}`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Coordinates {
    /// 0 to 1000 over the width and over the height.
    Permille,
    /// Pixels of the original picture.
    Pixels,
    /// Pixels of the picture as the model sees it, resized to `w` by `h`.
    ModelGrid {
        /// Width of the model's input.
        w: f64,
        /// Height of the model's input.
        h: f64,
    },
    /// 0 to 1 over the width and over the height.
    Unit,
}

impl Coordinates {
    /// The numbers of the lower right corner of the picture; None for pixels of an unknown size.
    pub fn extent(&self, image_size: Option<[f64; 2]>) -> Option<[f64; 2]> {
        match self {
            Coordinates::Permille => Some([1000.0, 1000.0]),
            Coordinates::Pixels => image_size,
            Coordinates::ModelGrid { w, h } => Some([*w, *h]),
            Coordinates::Unit => Some([1.0, 1.0]),
        }
    }

    /// A box of this convention in another one; `image_size` is `[width, height]` in pixels.
    ///
    /// # Errors
    /// [`BoxError::Option`] where a size is needed and missing, or is not positive.
    pub fn convert(
        &self,
        bbox: &Bbox,
        to: Coordinates,
        image_size: Option<[f64; 2]>,
    ) -> Result<Bbox, BoxError> {
        if *self == to {
            return Ok(*bbox);
        }
        let positive =
            |size: Option<[f64; 2]>| size.filter(|size| size.iter().all(|x| x.is_finite() && *x > 0.0));
        match (positive(self.extent(image_size)), positive(to.extent(image_size))) {
            (Some(from), Some(to)) => Ok(std::array::from_fn(|i| bbox[i] / from[i % 2] * to[i % 2])),
            _ => Err(BoxError::Option {
                option: "image_size",
                expected: "[width, height], both positive, to convert coordinates",
                found: format!("{image_size:?} with {self:?} and {to:?}"),
            }),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Coordinates::Permille => "permille (0 to 1000)",
            Coordinates::Pixels => "pixels",
            Coordinates::ModelGrid { .. } => "model_grid",
            Coordinates::Unit => "unit (0 to 1)",
        }
    }
}

/// The boxes of one data row.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct CoordinateSample {
    /// Gold boxes as the row states them.
    pub boxes: Vec<Bbox>,
    /// `[width, height]` of the picture, where known.
    #[serde(default)]
    pub image_size: Option<[f64; 2]>,
}

/// A sign that the setting and the data disagree.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CoordinateWarning {
    /// What is wrong and what to do.
    pub message: String,
    /// Indices of the first rows that show it, at most five.
    pub rows: Vec<usize>,
}

/// Boxes a convention must be seen in before its absence means something.
const ENOUGH: usize = 8;

/// Compares a setting with the data; an empty list means that they agree as far as one can tell.
pub fn check_coordinates(data: &[CoordinateSample], setting: Coordinates) -> Vec<CoordinateWarning> {
    let mut warnings = Vec::new();
    let mut warn = |what: String, hint: &str, rows: Vec<usize>| {
        if !rows.is_empty() {
            let share = format!("{} of {} rows", rows.len(), data.len());
            let message =
                format!("coordinates are set to {}, but {what} ({share})\nhint: {hint}", setting.name());
            warnings.push(CoordinateWarning { message, rows: rows.into_iter().take(5).collect() });
        }
    };
    let rows = |test: &dyn Fn(&Bbox, Option<[f64; 2]>) -> bool| -> Vec<usize> {
        let hit = |sample: &CoordinateSample| sample.boxes.iter().any(|b| test(b, sample.image_size));
        data.iter().enumerate().filter(|(_, sample)| hit(sample)).map(|(row, _)| row).collect()
    };
    warn(
        "some boxes have x1 >= x2 or y1 >= y2".into(),
        "boxes are [x1, y1, x2, y2]; are these [x, y, width, height], or are corners swapped?",
        rows(&|b, _| !(b[0] < b[2] && b[1] < b[3])),
    );
    warn("some boxes have negative numbers".into(), "clip the boxes to the picture", {
        rows(&|b, _| b.iter().any(|x| *x < 0.0))
    });
    // Annotations may touch the border by a rounding.
    let beyond = |b: &Bbox, extent: [f64; 2]| {
        (0..4).any(|i| b[i] > extent[i % 2] * 1.01 + if extent[0] > 1.0 { 1.0 } else { 0.0 })
    };
    warn(
        "some boxes lie outside the picture".into(),
        match setting {
            Coordinates::Unit => "numbers above 1 are pixels or permille",
            Coordinates::Permille => "numbers above 1000 are pixels",
            Coordinates::Pixels => "permille on a small picture, or pixels of a resized one?",
            Coordinates::ModelGrid { .. } => "are these pixels of the original picture?",
        },
        rows(&|b, size| setting.extent(size).is_some_and(|extent| beyond(b, extent))),
    );
    let boxes: Vec<(&Bbox, Option<[f64; 2]>, usize)> = data
        .iter()
        .enumerate()
        .flat_map(|(row, sample)| sample.boxes.iter().map(move |b| (b, sample.image_size, row)))
        .collect();
    let all_rows: Vec<usize> =
        data.iter().enumerate().filter(|(_, s)| !s.boxes.is_empty()).map(|(row, _)| row).collect();
    let within_unit =
        !boxes.is_empty() && boxes.iter().all(|(b, ..)| b.iter().all(|x| (0.0..=1.0).contains(x)));
    if within_unit && setting != Coordinates::Unit {
        warn("no number is above 1".into(), "the data looks like unit coordinates (0 to 1)", all_rows);
        return warnings;
    }
    if boxes.len() < ENOUGH {
        return warnings;
    }
    let sizes: Vec<[f64; 2]> = boxes.iter().filter_map(|(_, size, _)| *size).collect();
    let greatest = boxes.iter().flat_map(|(b, ..)| b.iter().copied()).fold(0.0, f64::max);
    let reach = |extent: &dyn Fn([f64; 2]) -> [f64; 2]| {
        boxes
            .iter()
            .filter_map(|(b, size, _)| size.map(|size| (b, extent(size))))
            .flat_map(|(b, extent)| [b[2] / extent[0], b[3] / extent[1]])
            .fold(0.0, f64::max)
    };
    let known = sizes.len() == boxes.len();
    let all_sizes = |test: &dyn Fn(f64) -> bool| known && sizes.iter().flatten().all(|side| test(*side));
    // Pictures smaller than 1000 and all boxes inside them: pixels, most likely.
    if setting == Coordinates::Permille && all_sizes(&|side| side < 950.0) && reach(&|size| size) <= 1.01 {
        let what = "every box lies within the pixel size of its picture";
        warn(what.into(), "the data looks like pixels", all_rows);
    } else if setting == Coordinates::Pixels
        && all_sizes(&|side| side > 1100.0)
        && (900.0..=1000.0).contains(&greatest)
    {
        let what = "no number is above 1000 though the pictures are larger";
        warn(what.into(), "the data looks like permille", all_rows);
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(boxes: &[Bbox], image_size: Option<[f64; 2]>) -> Vec<CoordinateSample> {
        boxes.iter().map(|b| CoordinateSample { boxes: vec![*b], image_size }).collect()
    }

    fn warned(data: &[CoordinateSample], setting: Coordinates, word: &str) -> bool {
        check_coordinates(data, setting).iter().any(|warning| warning.message.contains(word))
    }

    #[test]
    fn conversion_goes_there_and_back() {
        let image = Some([640.0, 480.0]);
        let grid = Coordinates::ModelGrid { w: 320.0, h: 240.0 };
        let pixels = [64.0, 48.0, 320.0, 240.0];
        let permille = Coordinates::Pixels.convert(&pixels, Coordinates::Permille, image).unwrap();
        assert_eq!(permille, [100.0, 100.0, 500.0, 500.0]);
        assert_eq!(Coordinates::Permille.convert(&permille, grid, None).unwrap(), [32.0, 24.0, 160.0, 120.0]);
        assert!(Coordinates::Pixels.convert(&pixels, Coordinates::Unit, None).is_err());
    }

    #[test]
    fn settings_that_do_not_fit_the_data_are_warned_of() {
        let small = Some([640.0, 480.0]);
        let large = Some([2000.0, 1500.0]);
        let pixels: Vec<Bbox> = (0..10).map(|i| [10.0, 10.0, 600.0 - f64::from(i), 470.0]).collect();
        let permille: Vec<Bbox> = (0..10).map(|i| [10.0, 10.0, 990.0 - f64::from(i), 980.0]).collect();
        let unit = [[0.1, 0.1, 0.9, 0.9]];
        assert!(check_coordinates(&data(&pixels, small), Coordinates::Pixels).is_empty());
        assert!(warned(&data(&pixels, small), Coordinates::Permille, "looks like pixels"));
        assert!(warned(&data(&pixels, small), Coordinates::Unit, "outside the picture"));
        assert!(check_coordinates(&data(&permille, small), Coordinates::Permille).is_empty());
        assert!(warned(&data(&permille, small), Coordinates::Pixels, "outside the picture"));
        assert!(warned(&data(&permille, large), Coordinates::Pixels, "looks like permille"));
        assert!(warned(&data(&unit, small), Coordinates::Pixels, "unit coordinates"));
        assert!(check_coordinates(&data(&unit, small), Coordinates::Unit).is_empty());
        let grid = Coordinates::ModelGrid { w: 448.0, h: 448.0 };
        assert!(warned(&data(&pixels, small), grid, "outside the picture"));
        assert!(warned(&data(&[[100.0, 100.0, 50.0, 50.0]], small), Coordinates::Pixels, "width, height"));
    }
}

-- may end in: timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do pcall(function() while true do end end) return 1 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
